"""Measures times beside one another: warmed up, waited for, interleaved, and with the noise said aloud.

On a shared machine speed drifts by more than most effects worth knowing. Callables that are compared therefore run in
turns, round after round, and a ratio is taken inside each round, where the drift is common to both.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from engine.counting.hardware import Ceilings, clock
from engine.errors import UserError

RATES = ("bf16_gflops", "f32_gflops", "int8_gflops", "read_gbs", "update_gbs")  # of Ceilings


class TooNoisyError(UserError):
    """The measurements do not carry this number; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one callable, one entry a round, in the order of the rounds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round, in seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The fastest round: the least disturbed one."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range in seconds: the middle half of the rounds lies within it."""
        return _interquartile(self.seconds)

    def scaled(self, factor: float) -> "Timing":
        """Returns the same rounds times a factor: 1 / tokens gives the seconds of a token, so that calls that do different
        amounts compare."""
        return Timing(self.name, tuple(seconds * factor for seconds in self.seconds))


class Ratio(NamedTuple):
    """The median of the ratios within each round, and their spread."""

    value: float
    spread: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.spread:.2f}"


def measure(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    warmups: int = 1,
    report: Callable[[int, int], None] | None = None,
    now: Callable[[], float] = clock,
    seconds_of: Callable[[Any], float] | None = None,
) -> dict[str, Timing]:
    """Returns name -> Timing of calls run in turns for `rounds` rounds, after `warmups` runs of each that do not count.

    The result of a call is waited for, so a JAX program's whole work is inside its time. Each round begins with another
    call: none always meets the cache its neighbour left. `report(done, total)` counts rounds. `seconds_of` takes
    the seconds from the result of calls that time a part of themselves. Raises ValueError without calls or rounds.
    """
    if not calls or rounds < 1:
        raise ValueError(f"measure needs a callable and a round: got {len(calls)} callables and {rounds} rounds")
    for call in calls.values():
        for _ in range(warmups):
            jax.block_until_ready(call())
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            begin = now()
            result = jax.block_until_ready(calls[name]())
            seconds[name].append(seconds_of(result) if seconds_of else now() - begin)
        if report:
            report(done + 1, rounds)
    return {name: Timing(name, tuple(each)) for name, each in seconds.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """Returns a over b, from timings of one `measure`. Raises TooNoisyError when the spread of the ratio exceeds the ratio, or
    when there are too few rounds to know a spread; ValueError when the timings are not of the same rounds."""
    if len(a.seconds) != len(b.seconds):
        raise ValueError(f"{a.name} has {len(a.seconds)} rounds, {b.name} has {len(b.seconds)}: not measured together")
    if len(a.seconds) < 3:
        raise TooNoisyError(f"{a.name} / {b.name}: {len(a.seconds)} rounds say nothing about noise; measure 3 or more.")
    if min(b.seconds) <= 0:
        raise TooNoisyError(f"{a.name} / {b.name}: {b.name} is too short for the clock; repeat it inside one call.")
    each = [x / y for x, y in zip(a.seconds, b.seconds)]
    result = Ratio(statistics.median(each), _interquartile(each))
    if result.spread > result.value:
        raise TooNoisyError(
            f"{a.name} / {b.name}: the ratio {result} is less than its own spread over {len(each)} rounds; "
            "measure on a quieter machine or for more rounds."
        )
    return result


def ratio_or_none(a: Timing, b: Timing) -> Ratio | None:
    """Returns a over b where the rounds carry a ratio, else None: a table has a place for what is lost in noise."""
    try:
        return ratio(a, b)
    except TooNoisyError:
        return None


def ratio_fields(a: Timing, b: Timing) -> dict[str, Any]:
    """Returns a over b as a JSON row has it: `ratio` and `spread`, or None with `noisy` telling why."""
    try:
        result = ratio(a, b)
    except TooNoisyError as error:
        return {"ratio": None, "spread": None, "noisy": str(error)}
    return {"ratio": result.value, "spread": result.spread}


def best_ceilings(first: Ceilings, second: Ceilings) -> Ceilings:
    """Returns the higher of each rate: on a shared machine they move, and the best counts."""
    return dataclasses.replace(first, **{rate: max(getattr(first, rate), getattr(second, rate)) for rate in RATES})


def noise(timings: Mapping[str, Timing]) -> str:
    """Says in one sentence how far these timings can be trusted, for the end of a report."""
    shares = {name: timing.spread / timing.median if timing.median else 0.0 for name, timing in timings.items()}
    worst = max(shares, key=shares.__getitem__)
    rounds = len(timings[worst].seconds)
    if shares[worst] <= 0.05:
        advice = "a quiet moment"
    elif shares[worst] <= 0.2:
        advice = "some noise: trust the ratios before the seconds"
    else:
        advice = "a noisy moment: trust only large ratios"
    return f"The middle half of {rounds} interleaved rounds spans {shares[worst]:.0%} of the median at worst: {advice}."


def _interquartile(values: tuple[float, ...] | list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low

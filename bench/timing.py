"""Measures times beside one another: warmed up, waited for, interleaved, and with the noise said aloud.

On a shared machine speed drifts by more than most effects worth knowing. Callables that are compared therefore run in
turns, round after round, and a ratio is taken inside each round, where the drift is common to both.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from engine.counting.hardware import clock


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one callable, in the order of the rounds; within `spread` lies the middle half of them."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        return _interquartile(self.seconds)

    def scaled(self, factor: float) -> "Timing":
        """Returns the same rounds times a factor: 1 / tokens gives the seconds of a token, so that calls that do different
        amounts compare."""
        return Timing(self.name, tuple(seconds * factor for seconds in self.seconds))


class Ratio(NamedTuple):
    """The median of the ratios within each round, and their spread; where the measurements do not carry one, None, and a
    sentence that says which and why: a table has a place for what is lost in noise."""

    ratio: float | None
    spread: float | None
    noisy: str | None = None

    def __str__(self) -> str:
        return "noisy" if self.ratio is None else f"{self.ratio:.2f} ± {self.spread:.2f}"

    def fields(self) -> dict[str, Any]:
        """Returns the fields as a JSON row has them, `noisy` only where it is."""
        return {name: value for name, value in self._asdict().items() if name != "noisy" or value}


def measure(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, warmups: int = 1,
    report: Callable[[int, int], None] | None = None, seconds_of: Callable[[Any], float] | None = None,
) -> dict[str, Timing]:  # fmt: skip
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
            begin = clock()
            result = jax.block_until_ready(calls[name]())
            seconds[name].append(seconds_of(result) if seconds_of else clock() - begin)
        if report:
            report(done + 1, rounds)
    return {name: Timing(name, tuple(each)) for name, each in seconds.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """Returns a over b, from timings of one `measure`; None when the spread of the ratio exceeds the ratio, or when there are
    too few rounds to know a spread. Raises ValueError when the timings are not of the same rounds."""
    rounds = len(a.seconds)
    if rounds != len(b.seconds):
        raise ValueError(f"{a.name} has {rounds} rounds, {b.name} has {len(b.seconds)}: not measured together")
    noisy = lambda why: Ratio(None, None, f"{a.name} / {b.name}: {why}.")
    if rounds < 3:
        return noisy(f"{rounds} rounds say nothing about noise; measure 3 or more")
    if min(b.seconds) <= 0:
        return noisy(f"{b.name} is too short for the clock; repeat it inside one call")
    each = [x / y for x, y in zip(a.seconds, b.seconds)]
    result, spread = statistics.median(each), _interquartile(each)
    if spread > result:
        return noisy(
            f"the ratio {Ratio(result, spread)} is less than its own spread over {rounds} rounds; measure on a quieter machine "
            "or for more rounds"
        )
    return Ratio(result, spread)


def noise(timings: Mapping[str, Timing]) -> str:
    """Says in one sentence how far these timings can be trusted, for the end of a report."""
    shares = {name: timing.spread / timing.median if timing.median else 0.0 for name, timing in timings.items()}
    worst = max(shares, key=shares.__getitem__)
    rounds = len(timings[worst].seconds)
    advice = "a noisy moment: trust only large ratios"
    if shares[worst] <= 0.2:
        advice = "a quiet moment" if shares[worst] <= 0.05 else "some noise: trust the ratios before the seconds"
    return f"The middle half of {rounds} interleaved rounds spans {shares[worst]:.0%} of the median at worst: {advice}."


def _interquartile(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low

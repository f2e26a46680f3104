"""How long things take beside one another: warmed up, waited for, interleaved, and with the noise said aloud.

On a shared machine speed drifts by more than most effects worth knowing. Callables that are compared therefore run in
turns, round after round, and a ratio is taken inside each round, where the drift is common to both.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from engine.counting.hardware import clock


class TooNoisyError(RuntimeError):
    """A number was asked for that the measurements do not carry; the message says which and why."""


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


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times `over` fits into `name`, as the median of the ratios within each round, with their spread."""

    name: str
    over: str
    value: float
    spread: float

    @property
    def differs(self) -> bool:
        """Whether the two are told apart: 1 lies outside value ± spread."""
        return abs(self.value - 1) > self.spread

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.spread:.2f}"


def measure(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    warmups: int = 1,
    report: Callable[[int, int], None] | None = None,
    now: Callable[[], float] = clock,
) -> dict[str, Timing]:
    """Name -> Timing of callables run in turns for `rounds` rounds, after `warmups` runs of each that do not count.

    What a callable returns is waited for, so a JAX program's whole work is inside its time. Each round begins with
    another callable: none always meets the cache its neighbour left. `report(done, total)` counts rounds. Raises
    ValueError without callables or rounds.
    """
    import jax

    if not runs or rounds < 1:
        raise ValueError(f"measure needs a callable and a round: got {len(runs)} callables and {rounds} rounds")
    for run in runs.values():
        for _ in range(warmups):
            jax.block_until_ready(run())
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            begin = now()
            jax.block_until_ready(runs[name]())
            seconds[name].append(now() - begin)
        if report:
            report(done + 1, rounds)
    return {name: Timing(name, tuple(taken)) for name, taken in seconds.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """a over b, from timings of one `measure`. Raises TooNoisyError when the spread of the ratio exceeds the ratio, or
    when there are too few rounds to know a spread; ValueError when the timings are not of the same rounds."""
    if len(a.seconds) != len(b.seconds):
        raise ValueError(f"{a.name} has {len(a.seconds)} rounds, {b.name} has {len(b.seconds)}: not measured together")
    if len(a.seconds) < 3:
        raise TooNoisyError(f"{a.name} / {b.name}: {len(a.seconds)} rounds say nothing about noise; measure 3 or more.")
    if min(b.seconds) <= 0:
        raise TooNoisyError(f"{a.name} / {b.name}: {b.name} is too short for the clock; repeat it inside one call.")
    each = [x / y for x, y in zip(a.seconds, b.seconds)]
    found = Ratio(a.name, b.name, statistics.median(each), _interquartile(each))
    if found.spread > found.value:
        raise TooNoisyError(
            f"{a.name} / {b.name}: the ratio {found} is less than its own spread over {len(each)} rounds; "
            "measure on a quieter machine or for more rounds."
        )
    return found


def each(timing: Timing, things: int) -> Timing:
    """The same rounds in seconds for each of the `things` a call did: calls that do different amounts then compare."""
    return Timing(timing.name, tuple(seconds / things for seconds in timing.seconds))


def told_apart(a: Timing, b: Timing) -> Ratio | None:
    """a over b where the rounds carry a ratio, else None: a table has a place for what is lost in noise."""
    try:
        return ratio(a, b)
    except TooNoisyError:
        return None


def noise(timings: Mapping[str, Timing]) -> str:
    """One sentence on how far these timings can be trusted, for the end of a report."""
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

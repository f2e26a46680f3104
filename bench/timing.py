"""Times calls in turns; gives their ratios, with the noise.

A ratio is the quotient of two medians, so that it agrees with the times printed beside it. A shared machine's speed drifts by
more than most effects worth knowing; so calls that are compared run in turns, and the spread of a ratio is that of the rounds'
own ratios, in which the drift is common to both.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from engine.counting.hardware import clock


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call in each round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range, in seconds."""
        return _interquartile(self.seconds)

    def scaled(self, factor: float) -> "Timing":
        """Returns the rounds times a factor: with 1 / tokens, calls of different amounts compare."""
        return Timing(self.name, tuple(seconds * factor for seconds in self.seconds))


class Ratio(NamedTuple):
    """The quotient of two medians, and the spread of the rounds' own; None where noise hides it, with a sentence on why."""

    ratio: float | None
    spread: float | None
    noisy: str | None = None

    def exceeds(self, threshold: float) -> bool | None:
        """Whether it is above a threshold; None where noise hides it or the threshold lies within ratio ± spread."""
        if self.ratio is None or self.spread is None or abs(self.ratio - threshold) <= self.spread:
            return None
        return self.ratio > threshold

    def scaled(self, factor: float) -> "Ratio":
        """Returns it times a factor above 0."""
        return self if self.ratio is None or self.spread is None else Ratio(self.ratio * factor, self.spread * factor)

    def __str__(self) -> str:
        return "noisy" if self.ratio is None else f"{self.ratio:.2f} ± {self.spread:.2f}"

    def fields(self) -> dict[str, Any]:
        """Returns the fields for a JSON row, `noisy` only if set."""
        return {name: value for name, value in self._asdict().items() if name != "noisy" or value}


def measure(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, warmups: int = 1,
    report: Callable[[int, int], None] | None = None, seconds_of: Callable[[Any], float] | None = None,
    until: float = math.inf,
) -> dict[str, Timing]:  # fmt: skip
    """Returns name -> Timing of calls run in turns for `rounds` rounds, after `warmups` runs of each.

    A call's time ends when its result is ready. Each round begins with another call, so that none always follows the same
    one. `report(done, total)` counts rounds. `seconds_of` takes the seconds from a call's result, for calls that time a part
    of themselves. `until`, a time of `clock`, ends the rounds after the third. Raises ValueError without calls or rounds.
    """
    if not calls or rounds < 1:
        raise ValueError(f"measure needs a callable and a round: got {len(calls)} callables and {rounds} rounds")
    for call in calls.values():
        for _ in range(warmups):
            jax.block_until_ready(call())
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        if done >= 3 and clock() > until:
            break
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            begin = clock()
            result = jax.block_until_ready(calls[name]())
            seconds[name].append(seconds_of(result) if seconds_of else clock() - begin)
        if report:
            report(done + 1, rounds)
    return {name: Timing(name, tuple(each)) for name, each in seconds.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """Returns a's median over b's, from timings of one `measure`; no number when its spread exceeds it, or below 3 rounds.

    Its spread is the middle half of the rounds' own ratios, stretched to hold the quotient.
    Raises ValueError when the timings are not of the same rounds.
    """
    rounds = len(a.seconds)
    if rounds != len(b.seconds):
        raise ValueError(f"{a.name} has {rounds} rounds, {b.name} has {len(b.seconds)}: not measured together")
    noisy = lambda why: Ratio(None, None, f"{a.name} / {b.name}: {why}.")
    if rounds < 3:
        return noisy(f"{rounds} rounds say nothing about noise; measure 3 or more")
    if min(b.seconds) <= 0:
        return noisy(f"{b.name} is too short for the clock; repeat it inside one call")
    each = [x / y for x, y in zip(a.seconds, b.seconds)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    result = a.median / b.median
    spread = max(high, result) - min(low, result)
    if spread > result:
        return noisy(
            f"the ratio {Ratio(result, spread)} is less than its own spread over {rounds} rounds; measure on a quieter machine "
            "or for more rounds"
        )
    return Ratio(result, spread)


def describe_noise(timings: Mapping[str, Timing]) -> str:
    """Returns a sentence on how far these timings can be trusted."""
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

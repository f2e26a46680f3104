"""Times calls in interleaved rounds, and judges the ratio of two by one rule.

A shared machine's speed drifts by more than most effects worth knowing. Calls that are compared
therefore run in the same rounds, and each round gives one ratio, in which the drift is common to
both calls. The ratio reported is the median of the rounds' ratios. Its 95% interval is that of
order statistics, which assumes nothing of how the noise is distributed: the median lies below the
k-th smallest of n ratios only if fewer than k of them fall below it, so a binomial distribution of
n fair coins gives k (David and Nagaraja, Order Statistics, 2003, section 7.1). A verdict needs
MIN_ROUNDS rounds.
"""

import dataclasses
import functools
import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from bench.deadline import is_past_deadline
from engine.counting.hardware import clock


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range, in seconds: it describes the machine's noise and judges nothing."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def scaled(self, factor: float) -> "Timing":
        """Returns the rounds times a factor: with 1 / tokens, calls of different amounts compare."""
        return Timing(tuple(seconds * factor for seconds in self.seconds))


# by whether a bar is exceeded
UNMET = {True: "", False: "   ** not met **", None: "   undecided, within the noise"}
# with fewer, not even the lowest and the highest ratio enclose the median with 95% certainty
MIN_ROUNDS = 6


class Ratio(NamedTuple):
    """The median of the ratios of rounds and its 95% interval, which is None with fewer than MIN_ROUNDS rounds.

    All are None where a call was too short for the clock, or was not measured.
    """

    ratio: float | None
    low: float | None = None
    high: float | None = None
    rounds: int | None = None
    round_ratios: Sequence[float] = ()  # that of each round, in the order in which they ran

    @staticmethod
    def of(row: Mapping[str, Any]) -> "Ratio":
        """Returns the ratio that a row of a document holds beside other things."""
        return Ratio(row["ratio"], row["low"], row["high"])

    def exceeds(self, threshold: float) -> bool | None:
        """Whether the ratio is above a threshold; None where the interval holds the threshold or is
        not known.
        """
        if self.low is None or self.high is None or self.low <= threshold <= self.high:
            return None
        return self.low > threshold

    def scaled(self, factor: float) -> "Ratio":
        """Returns the ratio times a factor above 0."""

        def scale(number: float | None) -> float | None:
            if number is None:
                return None
            return number * factor

        round_ratios = tuple(number * factor for number in self.round_ratios)
        return Ratio(scale(self.ratio), scale(self.low), scale(self.high), self.rounds, round_ratios)

    def format(self, write: Callable[[float], str] = "{:.2f}".format) -> str:
        """Formats the ratio and its interval, each number by `write`: `1.14 (1.10 to 1.18)`."""
        if self.ratio is None:
            return "not measured"
        if self.low is None or self.high is None:
            return f"{write(self.ratio)} (too few rounds to judge)"
        return f"{write(self.ratio)} ({write(self.low)} to {write(self.high)})"

    def __str__(self) -> str:
        return self.format()


def measure(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmups: int = 1,
    report: Callable[[int, int], None] | None = None,
    seconds_of: Callable[[Any], float] | None = None,
) -> dict[str, Timing]:
    """Returns name -> Timing of calls run in turns for `rounds` rounds, after `warmups` runs of
    each.

    A call's time ends when its result is ready. Each round begins with another call, so that none
    always follows the same one. The first is drawn, for there are processes of one round.
    `report(done, total)` counts rounds. `seconds_of` takes the seconds from a call's result, for
    calls that time a part of themselves. Past the deadline of --seconds no round is added to
    MIN_ROUNDS.
    """
    for call in calls.values():
        for _ in range(warmups):
            jax.block_until_ready(call())
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    first = random.randrange(len(names))
    for done in range(rounds):
        if done >= MIN_ROUNDS and is_past_deadline():
            break
        turn = (first + done) % len(names)
        for name in names[turn:] + names[:turn]:
            begin = clock()
            result = jax.block_until_ready(calls[name]())
            seconds[name].append(seconds_of(result) if seconds_of else clock() - begin)
        if report:
            report(done + 1, rounds)
    return {name: Timing(tuple(each)) for name, each in seconds.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """Returns a's time over b's, from timings of one `measure`: the median of the rounds' ratios,
    and its 95% interval.

    The interval is None below MIN_ROUNDS rounds. Raises ValueError when the timings are not of the
    same rounds.
    """
    return paired_ratio(a.seconds, b.seconds)


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Returns a over b by the rule of `ratio`, from two measures, of any unit, of the same rounds or
    samples. Raises ValueError when there are not as many of both.
    """
    pairs = [*zip(a, b, strict=True)]
    if min(*a, *b) <= 0:
        return Ratio(None)
    return median_ratio([x / y for x, y in pairs])


def median_ratio(each: Sequence[float]) -> Ratio:
    """Returns the median of the ratios of rounds, above 0, and its 95% interval, None below
    MIN_ROUNDS rounds.
    """
    from scipy.stats import binom  # here: it takes a second to import

    rounds = len(each)
    middle = math.exp(statistics.median(map(math.log, each)))
    if rounds < MIN_ROUNDS:
        return Ratio(middle, rounds=rounds, round_ratios=tuple(each))
    # at most 2.5% of medians lie below the ratio of this rank, counted from 1
    rank = int(binom.ppf(0.025, rounds, 0.5))
    ordered = sorted(each)
    return Ratio(middle, ordered[rank - 1], ordered[-rank], rounds, tuple(each))


def compare_rounds(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """Returns how many times larger the ratios of one run's rounds are than those of another's,
    above 0, with its 95% interval.

    It is the median of all quotients of a round after by a round before (Hodges and Lehmann 1963,
    Annals of Mathematical Statistics 34). The interval ends at two of these quotients, by the
    distribution of Mann and Whitney's U (Bauer 1972, Journal of the American Statistical
    Association 67); it is None where the rounds are too few to have one.
    """
    quotients = sorted(y / x for x, y in itertools.product(before, after))
    middle = math.exp(statistics.median(map(math.log, quotients)))
    rounds = min(len(before), len(after))
    rank = _least_rank(len(before), len(after))
    if rank == 0:
        return Ratio(middle, rounds=rounds)
    return Ratio(middle, quotients[rank - 1], quotients[-rank], rounds)


def _least_rank(first: int, second: int) -> int:
    """Returns the largest rank, counted from 1, at or below which U, of samples of these sizes,
    falls in 2.5% of cases at most.

    0 where even the first rank is reached more often.
    """
    total = math.comb(first + second, first)
    reached = 0
    rank = 0
    while True:
        reached += _orders(first, second, rank)
        if reached > 0.025 * total:
            return rank
        rank += 1


@functools.cache
def _orders(first: int, second: int, u: int) -> int:
    """Returns in how many orders of two samples so many pairs stand with the second sample's before
    the first's.
    """
    if u < 0:
        return 0
    if first == 0 or second == 0:
        return int(u == 0)
    return _orders(first - 1, second, u - second) + _orders(first, second - 1, u)


def held_to(over: Ratio, least: float | None) -> str:
    """Returns a ratio in words, and whether it is the least that is required."""
    return f"{over} times" + (f" (at least {least:g}{UNMET[over.exceeds(least)]})" if least else "")


def describe_noise(timings: Mapping[str, Timing]) -> str:
    """Returns a sentence on how far these timings can be trusted."""
    shares = dict.fromkeys(timings, 0.0)
    for name, timing in timings.items():
        if timing.median:
            shares[name] = timing.spread / timing.median
    worst = max(shares, key=shares.__getitem__)
    rounds = len(timings[worst].seconds)
    advice = "a noisy moment: trust only large ratios"
    if shares[worst] <= 0.2:
        if shares[worst] <= 0.05:
            advice = "a quiet moment"
        else:
            advice = "some noise: trust the ratios before the seconds"
    spread = f"{shares[worst]:.0%} of the median at worst"
    return f"The middle half of {rounds} interleaved rounds spans {spread}: {advice}."

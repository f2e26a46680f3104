"""Timings are interleaved, waited for and honest about noise. The clock is a pretended one: no test waits or races."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cli import run_bench
from bench.commands import CommandsFlags, measure_commands
from bench.deadline import is_past_deadline, set_deadline
from bench.step.__main__ import StepFlags, measure_step
from bench.timing import Timing, compare_rounds, describe_noise, measure, median_ratio, ratio
from engine.errors import UserError

ROUNDS = st.lists(st.tuples(st.floats(0.5, 50), st.floats(0.5, 50)), min_size=6, max_size=15)


class Clock:
    """Moves only when a callable says how long it took."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.order = []
        monkeypatch.setattr("bench.timing.clock", lambda: self.now)

    def takes(self, name, *seconds):
        turns = iter(seconds)

        def run():
            self.order.append(name)
            self.now += next(turns, seconds[-1])

        return run


@pytest.mark.parametrize(("first", "order"), [(0, "abbaab"), (1, "baabba")])
def test_rounds_interleave_start_elsewhere_each_time_and_skip_the_warm_up(monkeypatch, first, order):
    monkeypatch.setattr(random, "randrange", lambda count: first)
    clock = Clock(monkeypatch)
    runs = {"a": clock.takes("a", 100.0, 1.0), "b": clock.takes("b", 200.0, 2.0)}
    reports = []
    result = measure(runs, rounds=3, report=lambda done, total: reports.append((done, total)))
    assert "".join(clock.order) == "ab" + order
    assert result["a"].seconds == (1.0, 1.0, 1.0)
    assert result["b"].seconds == (2.0, 2.0, 2.0)
    assert list(result) == ["a", "b"]
    assert reports == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("limit", "rounds"), [(0.0, 6), (8.0, 7), (99.0, 9)])
def test_past_the_deadline_no_round_is_added_to_the_fewest_of_a_verdict(monkeypatch, limit, rounds):
    clock = Clock(monkeypatch)
    monkeypatch.setattr("bench.timing.is_past_deadline", lambda: clock.now >= limit)
    call = clock.takes("a", 1.0)  # a second, of which the first is the warm-up
    assert len(measure({"a": call}, rounds=9)["a"].seconds) == rounds
    assert len(measure({"a": call}, rounds=2)["a"].seconds) == 2


def test_seconds_of_a_command_set_the_deadline(monkeypatch, capsys):
    past = []
    for words in ([], ["--seconds", "0"], ["--seconds", "60"]):
        measured = lambda _: past.append(is_past_deadline()) or {"rows": []}
        assert run_bench("bench.nothing", "", CommandsFlags, measured, words) == 0
    set_deadline(None)
    assert past == [False, True, False]


def test_a_jax_result_is_waited_for_inside_the_time(monkeypatch):
    import jax

    clock = Clock(monkeypatch)

    def wait(value):
        if value == "unfinished":
            clock.now += 5.0
        return value

    monkeypatch.setattr(jax, "block_until_ready", wait)
    assert measure({"a": lambda: "unfinished"}, rounds=3)["a"].seconds == (5.0, 5.0, 5.0)


@given(ROUNDS, st.floats(0.01, 100))
def test_a_ratio_is_the_median_of_the_rounds_and_decides_nothing_within_its_interval(rounds, threshold):
    a, b = (Timing(tuple(each)) for each in zip(*rounds))
    result, back = ratio(a, b), ratio(b, a)
    assert result.low <= result.ratio <= result.high
    assert (1 / result.ratio, 1 / result.high, 1 / result.low) == pytest.approx(back[:3]), "either way round"
    assert result.exceeds(threshold) in (None, result.ratio > threshold)
    for inside in (result.low, result.ratio, result.high):
        assert result.exceeds(inside) is None
    assert result.exceeds(result.high * 1.01) is False
    assert result.exceeds(result.low * 0.99) is True
    assert result.scaled(2.0).exceeds(2 * threshold) == result.exceeds(threshold)


def simulated(rounds, difference, runs=4000, noise=0.03, drift=0.05):
    """The share of runs with a verdict on 1, where `a` takes `difference` more than `b`, both with
    noise, beside a drift.
    """
    rng = np.random.default_rng(rounds)
    common = rng.lognormal(0, drift, (runs, rounds))
    each = common[:, None] * rng.lognormal(0, noise, (runs, 2, rounds)) * [[1 + difference], [1]]
    return np.mean([ratio(Timing(a), Timing(b)).exceeds(1.0) is not None for a, b in each.tolist()])


@pytest.mark.parametrize("rounds", [6, 7, 9, 15])
def test_without_a_difference_at_most_one_run_in_twenty_decides(rounds):
    assert simulated(rounds, 0.0) <= 0.05


def test_fifteen_rounds_find_a_difference_of_five_percent():
    assert simulated(15, 0.05) >= 0.85


@given(
    st.lists(st.floats(0.5, 2), min_size=6, max_size=9), st.lists(st.floats(0.5, 2), min_size=6, max_size=9)
)
def test_two_runs_compare_alike_either_way_round(before, after):
    over, back = compare_rounds(before, after), compare_rounds(after, before)
    assert over.low <= over.ratio <= over.high
    assert (1 / over.ratio, 1 / over.high, 1 / over.low) == pytest.approx(back[:3])


def compared(difference, *, rounds=9, processes=1, effect=0.0, runs=2000, noise=0.03):
    """The share of pairs of runs with a verdict, where the second's ratio is larger by
    `difference`.

    Each of `processes` makes its share of the rounds, and has an effect of its own on their ratio,
    of deviation `effect`.
    """
    rng = np.random.default_rng(rounds)
    own = rng.lognormal(0, effect, (runs, 2, processes)) if effect else np.ones((runs, 2, processes))
    each = np.repeat(own, rounds // processes, axis=2) * rng.lognormal(0, noise, (runs, 2, rounds))
    verdicts = [
        compare_rounds(before, after * (1 + difference)).exceeds(1) is not None for before, after in each
    ]
    return np.mean(verdicts)


def test_two_runs_of_nine_rounds_find_five_percent_and_are_seldom_wrong():
    assert compared(0.05) >= 0.4
    assert compared(0.0) <= 0.05


def test_few_rounds_have_no_interval():
    assert compare_rounds([1.0, 1.1], [2.0, 2.1])[:3] == (pytest.approx(1.95, abs=0.1), None, None)
    assert compare_rounds([1.0] * 4, [2.0] * 4).exceeds(1) is True


def test_rounds_of_many_processes_are_seldom_wrong_where_processes_differ():
    """Each process is 2% faster or slower than the next. Rounds of one process cannot tell that
    from a change.
    """
    alone, three, nine = (compared(0.0, processes=processes, effect=0.02) for processes in (1, 3, 9))
    assert alone >= 0.25
    assert three <= 0.15
    assert nine <= 0.05


def judged(processes, *, rounds=9, effect=0.02, noise=0.03, runs=2000):
    """The share of measurements that say of two equal programs that one is faster.

    Each of `processes` makes its share of the rounds, and has an effect of its own on their ratio.
    """
    rng = np.random.default_rng(rounds)
    verdicts = []
    for _ in range(runs):
        own = np.repeat(rng.lognormal(0, effect, processes), rounds // processes)
        verdicts.append(median_ratio(own * rng.lognormal(0, noise, rounds)).exceeds(1) is not None)
    return np.mean(verdicts)


def test_a_ratio_of_many_processes_is_seldom_wrong_where_processes_differ():
    """As `bench.everything` says of its documents."""
    assert 0.2 <= judged(1) <= 0.3
    assert judged(3) <= 0.1
    assert judged(9) <= 0.05


def test_too_few_rounds_give_a_ratio_without_an_interval_and_a_call_too_short_for_the_clock_none():
    assert str(ratio(Timing((1.0,) * 6), Timing((0.0, *(1.0,) * 5)))) == "not measured"
    result = ratio(Timing((2.0,) * 5), Timing((1.0,) * 5))
    assert (result.ratio, result.low, result.exceeds(1.0)) == (2.0, None, None)
    assert str(result) == "2.00 (too few rounds to judge)"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ((1.0,) * 5, "0% of the median at worst: a quiet moment"),
        ((1.0, 1.1, 0.95, 1.05, 1.0), "5% of the median"),
        ((1.0, 1.2, 0.9, 1.0, 1.1), "some noise"),
        ((1.0, 2.0, 1.5, 1.0, 3.0), "a noisy moment"),
    ],
)
def test_noise_is_said_in_words_of_the_worst(seconds, words):
    assert words in describe_noise({"quiet": Timing((1.0,) * 5), "a": Timing(seconds)})


def test_the_record_of_experiments_holds_figures(capsys):
    rows = measure_step(StepFlags(of="recipes"))["experiments"]
    assert all(1 < float(row["bits per byte"]) < 8 and int(row["steps"]) > 0 for row in rows)
    assert all(row["change"] in capsys.readouterr().out for row in rows[:1])
    with pytest.raises(UserError, match="--of recipes does not use --rank"):
        measure_step(StepFlags(of="recipes", rank=4))


def test_a_whole_command_that_misses_its_bar_shows(monkeypatch, capsys):
    """The commands themselves run at night: tests/test_readme.py."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # which the measurement replaces
    result = {"val_bits_per_byte": 1.9, "first_step_seconds": 3.0, "peak_rss_bytes": 1e9}
    lines = [
        "predicted   1,200 steps, 1.6 epochs",
        "  predicted 930 steps in 3 min",
        "trained     1,000 steps in 3 min",
    ]
    monkeypatch.setattr("bench.commands._result", lambda *_: (result, lines))
    monkeypatch.setattr("bench.commands._help_seconds", lambda: 0.1)
    monkeypatch.setattr("bench.commands._first_output", lambda *_: (0.5, "0 recompiles"))
    rows = measure_commands(CommandsFlags())["rows"]
    late = "command to first trained step", "steps predicted before the run, off by"
    assert [row["name"] for row in rows if not row["met"]] == [*late]
    assert rows[-1]["value"] == pytest.approx(7)
    assert capsys.readouterr().out.count("** not met **") == 2

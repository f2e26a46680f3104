"""Documents of a machine within an hour: a current one is not measured again, a budget is kept, processes are pooled."""

import json
import shutil
import subprocess
import sys
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import everything, timing
from bench.cli import ROOT
from bench.docs.machines import OPTIONAL
from bench.everything import HOUR, MEASUREMENTS, MIN_ROUNDS, EverythingFlags, Measurement, pool, sum_budgets
from bench.timing import median_ratio
from engine.errors import UserError

ROUNDS = st.lists(st.floats(0.5, 2), min_size=1, max_size=4)


@given(st.lists(ROUNDS, min_size=1, max_size=5), st.floats(0.1, 3))
def test_a_pooled_ratio_is_of_the_rounds_of_all_processes(processes, bar):
    documents = [
        {
            "rows": [
                {"name": "a", "speed": float(number), "bar": bar, "met": None}
                | median_ratio(rounds)._asdict()
            ]
        }
        for number, rounds in enumerate(processes)
    ]
    (row,) = pool(documents)["rows"]
    together = median_ratio([ratio for rounds in processes for ratio in rounds])
    assert {name: row[name] for name in together._fields} == together._asdict()
    assert row["met"] == together.exceeds(bar)
    assert row["speed"] == (len(processes) - 1) / 2, "the median"
    assert row["name"] == "a"


def test_what_is_no_number_is_the_first_processes():
    documents = [
        {"commit": "a", "flags": {"rounds": 1, "quick": False}, "printed": ["x"]},
        {"commit": "b", "flags": {}, "printed": []},
    ]
    assert pool(documents) == documents[0]
    assert pool([{"a": None, "b": None}, {"a": {"c": 1.5}, "b": None}]) == {"a": {"c": 1.5}, "b": None}


def test_a_pooled_row_says_each_setting_that_its_processes_chose():
    flash = {"flash_attention": True, "threads": 2}
    plain = {"flash_attention": False, "threads": 2}
    documents = [{"rows": [{"peer_settings": [setting]}]} for setting in (flash, plain, flash)]
    assert pool(documents) == {"rows": [{"peer_settings": [flash, plain]}]}


MACHINE = {"processor": "a chip", "model_numbers": {}, "instructions": "avx2", "cores": 2}
ABOUT = {
    "commit": "c" * 40,
    "sources": "5" * 64,
    "versions": {"jax": "1"},
    "machine": MACHINE,
    "date": "2026-12-08T10:00:00Z",
}


def test_all_budgets_fit_into_the_hour_and_none_is_above_ten_minutes():
    ordinary = [measurement for measurement in MEASUREMENTS if measurement.file not in OPTIONAL]
    assert {measurement.file for measurement in MEASUREMENTS} >= {*OPTIONAL}
    assert sum_budgets(ordinary) <= HOUR == 3600
    assert max(measurement.budget for measurement in ordinary) <= 600


def test_no_measurement_has_fewer_rounds_than_a_verdict_needs():
    assert MIN_ROUNDS == timing.MIN_ROUNDS >= 5
    for measurement in MEASUREMENTS:
        if measurement.rounds:
            assert measurement.rounds * measurement.processes >= MIN_ROUNDS


class Clock:
    """Moves only when told."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(everything, "time", types.SimpleNamespace(monotonic=clock.monotonic))

    class Watch:
        def finish(self):
            return {"taken_by_others": 0.4}

    monkeypatch.setattr(everything, "Watch", Watch)
    return clock


@pytest.fixture
def measured(monkeypatch, clock):
    """The names of what was measured; `broken` fails. Nothing of it runs."""
    names = []

    def measure(measurement, path, _, limit):
        names.append(measurement.name)
        if measurement.name == "broken":
            raise UserError("it is broken.")
        path.write_text(json.dumps(ABOUT))

    monkeypatch.setattr(everything, "circumstances", lambda *_: ABOUT)
    monkeypatch.setattr(everything, "measure_document", measure)
    monkeypatch.setattr(everything, "write_readmes", lambda end: names.append("READMEs"))
    monkeypatch.setattr(
        everything,
        "MEASUREMENTS",
        [Measurement(name, (name,), 10) for name in ("one", "broken", "two", "peers-sizes")],
    )
    return names


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_same_command_goes_on_where_it_ended_at_any_commit(measured, monkeypatch, tmp_path):
    flags = EverythingFlags(tmp_path)
    with pytest.raises(UserError, match="broken failed"):
        everything.measure_everything(flags)
    assert measured == ["one", "broken", "two", "READMEs"], "not peers-sizes, which is asked for"
    measured.clear()
    monkeypatch.setattr(everything, "circumstances", lambda *_: ABOUT | {"commit": "d" * 40 + "-dirty"})
    with pytest.raises(UserError, match="broken failed"):
        everything.measure_everything(flags)
    assert measured == ["broken", "READMEs"]


@pytest.mark.parametrize("fields", [{"sources": "6" * 64}, {"sources": None}, {"versions": {"jax": "2"}}])
def test_a_document_of_other_sources_or_versions_is_measured_and_its_age_is_said(
    measured, tmp_path, capsys, fields
):
    flags = EverythingFlags(tmp_path, only=("one", "two"))
    everything.measure_everything(flags)
    change(tmp_path / "two.json", **fields)
    measured.clear()
    everything.measure_everything(flags)
    assert measured == ["two"]
    said = capsys.readouterr().err
    assert "one: current, of 2026-12-08 (commit cccccccc)" in said
    assert "two: to measure; there is one of 2026-12-08" in said


def test_a_current_document_is_measured_again_only_when_asked_whoever_disturbed_it(measured, tmp_path):
    everything.measure_everything(EverythingFlags(tmp_path, only=("one", "two")))
    change(tmp_path / "one.json", machine=MACHINE | {"taken_by_others": 0.9})
    measured.clear()
    everything.measure_everything(EverythingFlags(tmp_path, only=("one", "two")))
    assert measured == []
    everything.measure_everything(EverythingFlags(tmp_path, only=("one", "two"), again=("two",)))
    assert measured == ["two"]


def test_a_run_in_which_all_is_current_writes_nothing(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(everything, "MEASUREMENTS", [Measurement("one", ("one",), 10)])
    everything.measure_everything(EverythingFlags(tmp_path))
    everything.measure_everything(EverythingFlags(tmp_path))
    assert measured == ["one", "READMEs"]


def test_a_folder_of_another_processor_is_refused(measured, monkeypatch, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ABOUT | {"machine": MACHINE | {"processor": "another"}}))
    with pytest.raises(UserError, match=r"one\.json .* is of another processor.*choose another folder"):
        everything.measure_everything(EverythingFlags(tmp_path))
    assert measured == []


def test_an_unknown_name_is_refused(measured, tmp_path):
    for flags in (EverythingFlags(tmp_path, only=("x",)), EverythingFlags(tmp_path, again=("x",))):
        with pytest.raises(UserError, match="x is no document's name: one, broken, two, peers-sizes"):
            everything.measure_everything(flags)
    everything.measure_everything(EverythingFlags(tmp_path, only=("peers-sizes",)))
    assert measured == ["peers-sizes"]


def test_budgets_are_printed_with_their_sum(capsys):
    everything.print_budgets([Measurement("one", (), 40), Measurement("two", (), 500)])
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["40", "s", "one"] in lines
    assert ["600", "s", "in", "all"] in lines


@given(st.lists(st.tuples(st.floats(1, 600), st.floats(0, 10_000)), min_size=1, max_size=13))
def test_whatever_hangs_the_end_is_kept_and_each_has_its_budget(measurements_and_seconds):
    """Each takes so many seconds, and is killed at its limit."""
    clock = Clock()
    measurements = [Measurement(str(i), (), budget) for i, (budget, _) in enumerate(measurements_and_seconds)]
    limits = []

    def measure(measurement, path, peer_python, limit):
        limits.append(limit)
        clock.now += min(limit, measurements_and_seconds[int(measurement.name)][1])
        if measurements_and_seconds[int(measurement.name)][1] > limit:
            raise UserError("it was killed.")

    end = max(HOUR, sum_budgets(measurements))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(everything, "time", types.SimpleNamespace(monotonic=clock.monotonic))
        patch.setattr(everything, "measure_document", measure)
        failures = everything.measure_all(measurements, EverythingFlags(ROOT), end)
    assert clock.now + everything.WRITING_SECONDS <= end + 1e-6
    for measurement, limit, (_, seconds) in zip(measurements, limits, measurements_and_seconds, strict=True):
        assert measurement.budget - 1e-6 <= limit <= 2 * measurement.budget
        assert (measurement.name in failures) == (seconds > limit)


@pytest.mark.parametrize(("seconds", "processes"), [(1, 5), (30, 3), (1000, 3)])
def test_no_process_starts_that_would_end_beyond_the_budget_once_six_rounds_are_there(
    clock, monkeypatch, tmp_path, seconds, processes
):
    commands = []

    def run(words, limit):
        commands.append(words)
        clock.now += seconds
        return ABOUT | {"machine": dict(MACHINE)}

    monkeypatch.setattr(everything, "run_measurement", run)
    measurement = Measurement("step", ("bench.step",), 120, processes=5, rounds=2)
    everything.measure_document(measurement, tmp_path / "step.json", None, 9999)
    document = json.loads((tmp_path / "step.json").read_text())
    assert len(commands) == document["processes"] == processes
    assert commands[0] == ["bench.step", "--json", "--seconds", "72", "--rounds", "2"]
    assert document["machine"]["taken_by_others"] == 0.4
    assert document["sources"] == ABOUT["sources"]


def test_a_recording_is_not_kept(clock, monkeypatch, tmp_path):
    result = ABOUT | {"machine": dict(MACHINE), "lives": [0] * 1000, "cost": [1]}
    monkeypatch.setattr(everything, "run_measurement", lambda *_: result)
    path = tmp_path / "lives.json"
    everything.measure_document(Measurement("lives", ("bench.lives",), 10, drop=("lives",)), path, None, 10)
    document = json.loads(path.read_text())
    assert "lives" not in document
    assert document["cost"] == [1]


def test_sources_that_change_between_processes_and_a_lacking_peer_leave_no_document(
    clock, monkeypatch, tmp_path
):
    path = tmp_path / "peers.json"
    digests = iter("ab")
    monkeypatch.setattr(
        everything, "run_measurement", lambda *_: ABOUT | {"sources": next(digests), "peers": []}
    )
    with pytest.raises(UserError, match="changed between two processes"):
        everything.measure_document(Measurement("peers", (), 99, processes=2, rounds=3), path, None, 99)
    monkeypatch.setattr(everything, "run_measurement", lambda *_: ABOUT | {"peers": []})
    with pytest.raises(UserError, match="No peer is installed"):
        everything.measure_document(Measurement("peers", (), 99, has_peer=True), path, None, 99)
    assert not path.exists()


def test_a_hanging_process_is_killed_with_what_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    (tmp_path / "hanging.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"python -m hanging was killed after 1 s\."):
        everything.run_process(["hanging"], 1.0)
    assert time.monotonic() - begin < 60
    child = int((tmp_path / "child").read_text())
    state = f"/proc/{child}/stat"
    for _ in range(100):  # until init has buried it
        try:
            with open(state) as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    break
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


@pytest.mark.parametrize(("code", "fails"), [(0, False), (1, False), (2, True), (-9, True)])
def test_a_missed_bar_is_no_failure(monkeypatch, tmp_path, code, fails):
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    end = f"sys.exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
    (tmp_path / "ending.py").write_text(f"import os, sys\nprint('{{}}', flush=True)\n{end}\n")
    if fails:
        with pytest.raises(UserError, match=f"ended with {code}"):
            everything.run_measurement(["ending"], 60)
    else:
        assert everything.run_measurement(["ending"], 60) == {}


def test_what_is_current_is_told_without_jax(tmp_path):
    """A second run takes a second or so."""
    program = (
        "import sys; from bench.everything import *; "
        "measure_everything(EverythingFlags(Path(sys.argv[1]), only=('step',))); print('jax' in sys.modules)"
    )
    about = everything.circumstances(["bench.step"], EverythingFlags(tmp_path))
    (tmp_path / "step.json").write_text(json.dumps(about, default=str))
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False"]
    assert "step: current" in run.stderr


@pytest.mark.night
@pytest.mark.timeout(900)
def test_a_sitting_through_the_real_command(tmp_path):
    """On a copy of this checkout without git: a document of several processes, which is current in
    the second run.
    """
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("engine", "stages", "bench"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = [
        "-m",
        "bench.everything",
        "--folder",
        "bench/results/here",
        "--only",
        "step-finetuning",
        "--json",
    ]
    runs = []
    for _ in range(2):
        runs.append(
            subprocess.run(
                [sys.executable, *words], cwd=checkout, capture_output=True, text=True, check=False
            )
        )
        assert runs[-1].returncode == 0, runs[-1].stderr
    document = json.loads((checkout / "bench/results/here/step-finetuning.json").read_text())
    assert document["machine"]["reached_before"]["f32_gflops"] > 0
    assert document["commit"] is None
    assert len(document["sources"]) == 64
    assert "measuring step-finetuning: python -m bench.step" in runs[0].stderr
    assert "step-finetuning: current" in runs[1].stderr

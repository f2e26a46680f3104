"""What a run's seconds were for, over all of its starts: none is counted twice, and a killed start's are not forgotten."""

import json
import os
import time

import pytest

from stages.runs import goodput
from stages.runs.goodput import Starts

HOUR = 3600.0
BEGAN = 1_000_000.0  # of the first start, in seconds since 1970


@pytest.fixture
def at(monkeypatch):
    """Sets the clock to so many seconds after the first start; a process is as old as it says."""

    def at(seconds, age=0.0):
        monkeypatch.setattr(time, "time", lambda: BEGAN + seconds)
        monkeypatch.setattr(goodput, "process_start", lambda: time.perf_counter() - age)

    return at


def test_one_start_that_ends(at, tmp_path):
    at(2, age=2)
    starts = Starts(tmp_path, 0.0, is_new=True)
    starts.current.starting, starts.current.trained, starts.current.evaluating = 10.0, 80.0, 6.0
    at(100)
    found = starts.goodput(kept=80.0)
    assert (found.total, found.kept, found.lost, found.waiting, found.restarts) == pytest.approx(
        (100, 80, 0, 0, 0), abs=0.1
    )
    assert (
        found.describe()
        == "80% of 1 min 40 s: 1 min 20 s trained, 10 s starting and compiling and 6 s evaluating"
    )


def test_a_start_that_was_killed_lost_what_no_checkpoint_had(at, tmp_path):
    """It trained for 50 s and saved at 30; a line of metrics is its last sign. The next comes an hour later."""
    at(0)
    first = Starts(tmp_path, 0.0, is_new=True)
    first.current.trained = 30.0
    at(40)
    first.write()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 5, "seconds": 50.0}) + "\n")
    os.utime(metrics, (BEGAN + 60, BEGAN + 60))
    at(60 + HOUR)
    second = Starts(tmp_path, 30.0, is_new=False)
    second.current.trained = 70.0
    at(60 + HOUR + 80)
    found = second.goodput(kept=100.0)
    assert (found.lost, found.waiting, found.restarts) == pytest.approx((20.0, HOUR, 1))
    assert "over 1 restart: " in found.describe()
    assert "20 s lost and 1 h waiting" in found.describe()


def test_a_run_that_is_begun_anew_forgets_its_starts(at, tmp_path):
    at(0)
    Starts(tmp_path, 0.0, is_new=True)
    assert Starts(tmp_path, 0.0, is_new=True).goodput(0.0).restarts == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"starts": 1}', '{"starts": [{"began": 1}]}', '{"starts": [null]}']
)
def test_a_file_that_is_damaged_ends_no_run(at, tmp_path, text):
    at(0)
    (tmp_path / goodput.NAME).write_text(text)
    assert Starts(tmp_path, 0.0, is_new=False).goodput(0.0).restarts == 0

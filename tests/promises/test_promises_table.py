"""The table of promises: a figure that misses its bar shows, and so does a promise that could not be tried."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "text"))

from chat_models import save_chat_model
from figures import at_least, at_most, exactly, milliseconds

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("figure", "met", "wanted", "measured"),
    [
        (at_most("a", 1, 1), True, "a ≤ 1", "a 1"),
        (at_least("b", 0.94, 0.95), False, "b ≥ 0.95", "b 0.94"),
        (exactly("code", -15, 0), False, "code = 0", "code -15"),
        (exactly("code", None, 0), False, "code = 0", "code none"),
        (milliseconds("p99", 0.0501, 100), True, "p99 ≤ 100 ms", "p99 50.1 ms"),
        (at_most("c", math.nan, 1), False, "c ≤ 1", "c none"),
        (at_least("d", math.inf, 1, " s"), True, "d ≥ 1 s", "d inf s"),
    ],
)
def test_a_figure_meets_its_bar_or_not(figure, met, wanted, measured):
    assert (figure.met, figure.wanted, str(figure)) == (met, wanted, measured)


def run_promises(model, files, *options):
    """Exit code and output of `pytest -m promises` in a process of its own, on files of this folder or, for "", all."""
    command = [sys.executable, "-m", "pytest", *(f"tests/promises/{file}" for file in files.split(",")), "-m", "promises"]
    command += ["--quick", "--promises-slots", "2", "--promises-model", model, "-p", "no:cacheprovider", *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


def test_promises_of_a_real_server(tmp_path):
    save_chat_model(tmp_path)
    code, output = run_promises(str(tmp_path), "test_access.py,test_weights_unchanged.py", "-n", "0", "--promise", "x4,S3")
    assert code == 0, output
    assert "2 of 2 promises kept. With --quick" in output
    rows = [line.split() for line in output.splitlines() if line.rstrip().endswith(" yes")]
    assert [row[0] for row in rows] == ["S3", "X4"], output


def test_a_promise_that_cannot_be_tried_is_not_kept_whichever_worker_tries_it():
    code, output = run_promises("no-such-model", "test_same_bytes.py,test_lifecycle.py", "-n", "1", "--promise", "S1,S8")
    assert code == 1, output
    assert "0 of 2 promises kept" in output
    assert "There is no model at no-such-model" in output


def test_a_promise_is_chosen_by_its_name():
    code, output = run_promises("no-such-model", "", "-n", "0", "--promise", "S99")
    assert code == 4, output
    serving = "S1, S2, S3, S4, S5, S6, S7, S8, S9, S10, S11, S17"
    training = "T1, T2, T3, T4, T5, T6, T7, T8, T9, T10, T11, T14"
    assert f"There is no promise S99; there are {serving}, {training}, X2, X3, X4, X5." in output
    table = Path(__file__).with_name("README.md").read_text()
    assert all(f"\n| {name} | " in table for name in f"{serving}, {training}, X2, X3, X4, X5".split(", "))

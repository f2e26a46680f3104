"""The summary of promises: one that holds, one that misses its bar, and one that could not be tried."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.docs.blocks import PROMISES
from tests.promises.conftest import by_number
from tests.promises.figures import at_least, at_most, exactly
from tests.text.chat_models import save_chat_model

ROOT = Path(__file__).parents[2]
DIGEST = "test_requests.py::test_the_digest_is_that_of_load[real]"


def test_a_figure_meets_its_bar_or_not():
    figures = (
        at_most("a", 1, 1),
        at_least("b", 0.94, 0.95),
        exactly("code", None, 0),
        at_most("c", float("nan"), 1),
    )
    assert [figure.is_met for figure in figures] == [True, False, False, False]
    assert [str(figure) for figure in figures[:3]] == [
        "a 1 (at most 1)",
        "b 0.94 (at least 0.95)",
        "code nan (wanted 0)",
    ]


def test_the_figures_of_every_promise_are_kept_in_order():
    assert sorted(PROMISES, key=by_number)[:2] == ["F2", "S1"]


def run_promises(model, names, *options):
    """Exit code and output of the command for these promises of serving, in a process of its own."""
    chosen = " or ".join(f"promises(name='{name}')" for name in names)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/promises",
        "-m",
        chosen,
        "--quick",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [*command, "--promises-slots", "2", "--promises-model", model],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.whole
def test_promises_of_a_real_server(tmp_path):
    """What was found takes the place of what the same trials found before; figures of other promises stay."""
    save_chat_model(tmp_path)
    kept = tmp_path / "promises.json"
    older = [
        {"promise": name, "trial": trial, "figures": []} for name, trial in (("T1", "of T1"), ("S3", DIGEST))
    ]
    kept.write_text(json.dumps({"rows": older}))
    code, output = run_promises(str(tmp_path), ["X4", "S3"], "-n", "0", "--promises-out", str(tmp_path))
    assert code == 0, output
    rows = json.loads(kept.read_text())["rows"]
    assert [row["promise"] for row in rows] == ["S3", "X4", "T1"]
    assert (rows[0]["trial"], rows[0]["quick"]) == (DIGEST, True)
    assert rows[0]["figures"][0]["value"] == 1
    assert rows[2] == older[0]
    assert "2 of 2 promises kept." in output
    assert [line.split()[:2] for line in output.splitlines() if " kept: " in line] == [
        ["S3", "kept:"],
        ["X4", "kept:"],
    ]


@pytest.mark.night
def test_a_promise_that_cannot_be_tried_is_not_kept_whichever_worker_tries_it():
    code, output = run_promises("no-such-model", ["S1", "S8"], "-n", "1")
    assert code == 1, output
    assert "0 of 2 promises kept" in output
    assert "There is no model at no-such-model" in output

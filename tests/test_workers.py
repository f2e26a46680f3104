"""A run of the tests ends and says what was wrong, whatever happens to the processes that run them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PLANTED = """
import os, time
import pytest

def test_before(): pass

@pytest.mark.timeout(0.1)
def test_without_end(): time.sleep(60)

def test_abort(): os.abort()

def test_after(): pass
"""


def test_a_run_ends_where_a_test_does_not_and_where_a_worker_dies(tmp_path):
    """By default pytest-xdist sends the finished file to a new worker, and waits for its tests for ever."""
    (tmp_path / "test_a.py").write_text("def test(): pass\n")
    (tmp_path / "test_b.py").write_text(PLANTED)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",  # which the run of this test may have
        "-p",
        "tests.workers",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "-n", "1", tmp_path], capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 1
    assert "test_b.py::test_without_end - Failed: Timeout" in run.stdout
    assert "crashed while running 'test_b.py::test_abort'" in run.stdout.replace(f"{tmp_path}/", "")
    assert "2 failed, 2 passed" in run.stdout

"""What runs without being asked: the workflows start the scripts of .ci, and the night runs what the default run leaves out."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
PARTS = {
    "sweeps": "python -m pytest -m night and not promises --ignore tests/clients",
    "order": "--with pytest-randomly==5.1.0 python -m pytest -n 0 --ignore tests/test_readme.py",
    "clients": "--with-requirements tests/clients/requirements.txt python -m pytest tests/clients -m night",
    "serving": '--with vllm-router==0.1.17; sys_platform == "linux" python -m pytest tests/promises '
    "--ignore tests/promises/training -m promises -n 0 --promises-out FIGURES",
    "training": "python -m pytest tests/promises/training -m promises -n 0 --promises-out FIGURES",
}


def read(name):
    return yaml.safe_load(WORKFLOWS[name].read_text())


def triggers(workflow):
    return workflow[True]  # YAML 1.1 reads the word `on` so


def test_each_change_and_each_night_run_one_script():
    changes, night = read("ci"), read("night")
    assert {"push", "pull_request"} <= set(triggers(changes))
    assert triggers(night)["schedule"]
    assert ".ci/run" in [step.get("run") for step in changes["jobs"]["run"]["steps"]]
    assert ".ci/night ${{ matrix.part }}" in [step.get("run") for step in night["jobs"]["run"]["steps"]]
    assert night["jobs"]["run"]["strategy"]["matrix"]["part"] == list(PARTS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_only_read_and_ends(name):
    workflow = read(name)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets" not in WORKFLOWS[name].read_text()
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 360, "which is all that a job gets"
        for action in (step["uses"] for step in job["steps"] if "uses" in step):
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", action)


@pytest.mark.parametrize(
    ("asked", "code"), [([], 0), (["training"], 0), ([], 1)], ids=["all", "one part", "all fail"]
)
def test_the_night_runs_each_part_and_says_whether_one_failed(asked, code, tmp_path):
    """A part that fails keeps none of the others from running."""
    program = tmp_path / "uv"
    program.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/log\nexit {code}\n')
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FIGURES": "FIGURES"}
    done = subprocess.run([ROOT / ".ci" / "night", *asked], env=env, check=False)
    assert done.returncode == code
    started = (tmp_path / "log").read_text().splitlines()
    assert started == [f"run --extra dev {PARTS[part]}" for part in asked or PARTS]


def test_the_night_names_its_parts():
    done = subprocess.run([ROOT / ".ci" / "night", "promises"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "There is no part promises: sweeps, order, clients, serving and training.\n",
    )

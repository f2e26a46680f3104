"""The cluster's files under stand-ins of their schedulers: which exit codes start a run again, and which end it."""

import os
import re
import signal
import subprocess

import pytest
import yaml

from engine.mesh.processes import MISTAKE, RESTART
from tests.stages.tiny_runs import ROOT

CLUSTER = ROOT / "stages" / "cluster"
# What a process that loses another one ends with: its own sentence, or JAX's abort where that is
# sooner. README.md says so too.
LOST = (RESTART, 128 + signal.SIGABRT)
KILLED = 128 + signal.SIGKILL
STOPPED = 128 + signal.SIGTERM
ENDS = (0, 1, MISTAKE)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Writes a program of that name, in bash, which is found before the machine's own; `log` lies
    beside it.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))

    def write(name, script):
        program = folder / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> "$LOG"\n{script}\n')
        program.chmod(0o755)

    return write


@pytest.mark.parametrize("code", [*LOST, KILLED, STOPPED, *ENDS])
def test_slurm_queues_a_job_again(code, stand_in, tmp_path, monkeypatch):
    """Its own stop at the end of its time asks for a restart too."""
    stand_in("srun", f"exit {code}")
    stand_in("squeue", "echo RUNNING")
    stand_in("scontrol", "")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    done = subprocess.run(["bash", CLUSTER / "slurm.sbatch"], check=False)
    assert done.returncode == code
    assert ("scontrol requeue 7" in (tmp_path / "log").read_text()) == (code not in ENDS)


@pytest.mark.parametrize("code", [*LOST, KILLED, *ENDS])
def test_a_machine_of_a_tpu_slice_starts_the_command_again(code, stand_in, tmp_path, monkeypatch):
    """The first start ends with the code, and a second one with 0. `gcloud` runs what it is to run
    on every machine here.
    """
    share = tmp_path / "shared"
    (share / "thrice").mkdir(parents=True)
    script = tmp_path / "tpu.sh"
    script.write_text((CLUSTER / "tpu.sh").read_text().replace("/shared", str(share)))
    for name in ("sudo", "mountpoint", "pip"):
        stand_in(name, "")
    stand_in("uv", f'[ "$(grep -c "^uv run" "$LOG")" = 1 ] && exit {code}; exit 0')
    stand_in(
        "gcloud",
        'for word; do case "$word" in --command=*) bash -c "${word#--command=}"; exit;; esac; '
        "done; echo READY",
    )
    for name in ("PROJECT", "ZONE", "SHARE"):
        monkeypatch.setenv(name, "here")
    done = subprocess.run(["bash", script], check=False, timeout=300)
    starts = re.findall("^uv run", (tmp_path / "log").read_text(), re.M)
    assert len(starts) == 1 + (code not in ENDS)
    assert done.returncode == (code if code in ENDS else 0)


def test_kubernetes_starts_a_set_again_after_any_code_but_a_mistakes():
    """JAX's abort is 139 there: the first process of a container cannot be ended by SIGABRT, and
    meets SIGSEGV.
    """
    [job_set, _] = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "trainer", "operator": "In", "values": [MISTAKE]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] >= 100
    assert job_set["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


@pytest.mark.parametrize(
    "readme", [CLUSTER / "README.md", CLUSTER.parent / "README.md"], ids=["cluster", "stages"]
)
def test_the_readmes_name_both_codes(readme):
    text = " ".join(readme.read_text().split())
    assert re.search(rf"code\W+(is )?{LOST[0]}\W+or {LOST[1]} where JAX", text)

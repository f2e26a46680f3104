"""Training under a cluster's engines: by Ray the bits of processes started by hand; a TrainJob by Kubeflow's own types."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml

from engine.storage.model_loader import load_model
from tests.stages.distributed.many_processes import FLAGS, finish, start  # noqa: F401
from tests.stages.test_cluster_files import CLUSTER
from tests.stages.tiny_runs import ROOT, metrics, tiny

pytestmark = pytest.mark.night


def test_rays_workers_train_to_the_bits_of_processes_started_by_hand(start, tmp_path):  # noqa: F811
    pytest.importorskip("ray", reason="tests/clients/requirements.txt is not installed")
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 400)
    by_hand, by_ray = tmp_path / "by hand", tmp_path / "by ray"
    codes, errors = finish(start(2, "train", *tiny(text, by_hand, *FLAGS)))
    assert codes == {0}, errors
    flags = [str(word) for word in tiny(text, by_ray, *FLAGS)]
    command = [sys.executable, str(CLUSTER / "ray_train.py"), "--workers", "2", "--", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in (by_hand, by_ray)]
    assert losses[0] == losses[1]
    jax.tree.map(np.testing.assert_array_equal, *(load_model(str(run)).params for run in (by_hand, by_ray)))


def test_the_train_job_has_the_fields_that_kubeflows_trainer_knows():
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="tests/clients/requirements.txt is not installed"
    )
    job = yaml.safe_load((CLUSTER / "trainjob.yaml").read_text())
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job

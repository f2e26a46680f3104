"""Runs `stages.train` in the workers of a Ray cluster, each of which is one process of the run.

    python stages/cluster/ray_train.py --workers 2 -- nano --data corpus.bin --out-dir runs/nano

The flags behind `--` are those of `stages.train`. The folders that they name must be on a file system
that all machines share.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.jax import JaxTrainer

from engine.mesh.processes import ANNOUNCED

ROOT = Path(__file__).resolve().parents[2]


def train(config: dict[str, Any]) -> None:
    """Runs the command as the process of this worker. Raises CalledProcessError if it fails."""
    context = ray.train.get_context()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = broadcast_from_rank_zero(f"{ray.util.get_node_ip_address()}:{port}")
    place = (address, str(context.get_world_size()), str(context.get_world_rank()))
    command = [sys.executable, "-m", "stages.train", *config["flags"]]
    subprocess.run(command, cwd=config["folder"], env=os.environ | dict(zip(ANNOUNCED, place)), check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of the run")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each")
    parser.add_argument(
        "--restarts", type=int, default=0, help="times that a run that failed is started again"
    )
    parser.add_argument("flags", nargs="*", help="flags of `stages.train`, behind --")
    arguments = parser.parse_args()
    resources = {"CPU": 1, "GPU": arguments.gpus}
    # Without `use_gpu` Ray leaves it to the command to join the processes.
    scaling = ScalingConfig(num_workers=arguments.workers, resources_per_worker=resources)
    run = RunConfig(failure_config=FailureConfig(max_failures=arguments.restarts))
    config = {"flags": arguments.flags, "folder": str(ROOT)}
    JaxTrainer(train, train_loop_config=config, scaling_config=scaling, run_config=run).fit()


if __name__ == "__main__":
    main()

"""Train a model from random weights on a text.

    python -m stages.train                                  the demo: Shakespeare, three minutes
    python -m stages.train nano --data book.txt --steps 2000
    python -m stages.train --dry-run                        what it would take, without doing it
    python -m stages.train --mesh data=2,fsdp=4             on eight devices
    python -m stages.train --by-hand                        in NumPy, with every gradient written out

The same command run again resumes where it stopped.
"""

import os
from collections.abc import Sequence

from engine.device import start_jax
from engine.distributed import refuse_cluster
from engine.model.config import PRESETS
from stages.cli import signals
from stages.cli.command import run_command
from stages.cli.process import leave
from stages.train.flags import TrainFlags

NARROW = 256  # products of a narrower model are over before a second thread has woken up


def train(flags: TrainFlags) -> int:
    signals.set_phase("before anything was trained.")
    if flags.by_hand and PRESETS[flags.preset].width < NARROW:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported; JAX is not concerned
    connect = (lambda: refuse_cluster("--by-hand")) if flags.by_hand else flags.mesh.connect
    device = start_jax("cpu" if flags.by_hand else flags.device, connect=connect)
    from stages.train.run import run  # imports JAX, which must be started first

    return run(flags, device)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("train", __doc__, TrainFlags, train, args)


if __name__ == "__main__":
    leave(main())

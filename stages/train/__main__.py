"""Train a model from random weights on a text.

    python -m stages.train                                  the demo: Shakespeare, three minutes
    python -m stages.train nano --data book.txt --steps 2000
    python -m stages.train --dry-run                        what it would take, without doing it
    python -m stages.train --mesh data=2,fsdp=4             on eight devices

The same command run again resumes where it stopped.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import functools

from engine.device import start_jax
from stages.cli import signals
from stages.cli.command import leave, run_command
from stages.train.flags import TrainFlags


def train(flags: TrainFlags) -> int:
    signals.set_phase("before anything was trained.")
    device = start_jax(flags.device, connect=flags.mesh.connect)
    from stages.train.run import run  # imports JAX, which must be started first

    return run(flags, device)


main = functools.partial(run_command, "train", __doc__, TrainFlags, train)


if __name__ == "__main__":
    leave(main())

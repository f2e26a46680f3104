"""Train a model from random weights on a text.

    python -m stages.train                                  the demo: Shakespeare, three minutes
    python -m stages.train nano --data book.txt --steps 2000
    python -m stages.train --dry-run                        what it would take, without doing it
    python -m stages.train --by-hand                        in NumPy, with every gradient written out

The same command run again goes on where it stopped.
"""

import sys
from collections.abc import Sequence

from engine.device import start_jax
from engine.model.config import PRESETS
from stages.cli import process, signals
from stages.cli.command import run_command
from stages.train.flags import Train

NARROW = 256  # products of a narrower model are over before a second thread has woken up


def train(flags: Train) -> int:
    """Starts JAX and trains as the flags say. Returns the exit code."""
    signals.set_phase("before anything was trained.")
    if flags.by_hand and PRESETS[flags.preset].width < NARROW:
        process.use_one_numpy_thread()
    device = start_jax("cpu" if flags.by_hand else flags.device)
    from stages.train.run import run  # imports JAX: only after the flags are parsed, and JAX is started

    return run(flags, device)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("train", __doc__, Train, train, args)


if __name__ == "__main__":
    sys.exit(main())

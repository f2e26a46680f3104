"""Measures training beside PyTorch and inference beside Hugging Face transformers, in one run.

    python -m bench.peers                                 both, with the peers of this Python (the extra `peers`)
    python -m bench.peers --peer-python peers/bin/python  peers that live in an environment of their own
    python -m bench.peers --quick                         small shapes, one or two minutes

A peer is a process that computes the same from the same weights. It and we run in turns, with all cores, so that what else
this machine does hits both alike. A ratio is our time over the peer's: below 1, Thrice takes less.
"""

import dataclasses
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

from bench.cli import Json, check_rounds, override_defaults, parse_shape, run_bench
from bench.peers.process import start_peer
from engine.device import cores, device_name, start_jax
from engine.errors import UserError


@dataclasses.dataclass(frozen=True)
class PeersFlags:
    """Which comparisons, at which shapes, and where the peers live."""

    peer_python: Path | None = None
    """The Python that has the peers, when it is not this one."""
    only: Literal["all", "training", "inference"] = "all"
    shape: str = "6x384x256x16"
    """Of training: LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    preset: str = "smollm2-135m"
    """Of inference: the architecture, with random weights."""
    prompt: int = 256
    """Tokens of a prompt in the prefill rows; the decode rows have 64."""
    new: int = 33
    """Tokens to generate in the decode rows."""
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    rounds: int = 9
    """Interleaved rounds, at least 6; the median counts."""
    quick: bool = False
    """Small shapes and bfloat16 alone, unless another value is given."""


QUICK: Json = {"shape": "2x128x64x8", "preset": "demo", "prompt": 64, "new": 17, "dtypes": ("bfloat16",), "rounds": 6}


def measure_peers(flags: PeersFlags) -> Json:
    """Measures the rows beside the peers that are installed, prints them, and returns the document."""
    if flags.quick:
        flags = override_defaults(flags, QUICK)
    shape = parse_shape("--shape", flags.shape)
    check_rounds(flags.rounds)
    for name, value, least in (("prompt", flags.prompt, 1), ("new", flags.new, 2)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}.")
    if not flags.dtypes:
        raise UserError("--dtypes needs bfloat16, float32 or both.")
    start_jax()
    from bench.peers import measure

    measure.check_preset(flags.preset, flags.prompt, flags.new, runs=flags.only != "training")
    print(f"{device_name()}, {cores()} cores, {flags.rounds} interleaved rounds; a ratio is our time over the peer's")
    if (load := os.getloadavg()[0]) > cores() / 4:
        # OpenMP's threads meet after every operation, and one that is put aside holds up all: the same training row read
        # 0.4 at a load of 9 and 1.1 in a quiet moment.
        print(f"others are at work on this machine (load {load:.1f}): that costs PyTorch more than us and flatters the ratios")
    rows: list[Json] = []
    absent: list[dict[str, str]] = []
    stages = {
        "training": ("torch_peer.py", functools.partial(measure.measure_training, shape)),
        "inference": (
            "transformers_peer.py", functools.partial(measure.measure_inference, flags.preset, flags.prompt, flags.new)
        ),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for script, add_rows in (stages[stage] for stage in stages if flags.only in ("all", stage)):
            with start_peer(flags.peer_python, script, absent) as peer:
                for dtype in flags.dtypes if peer else ():
                    add_rows(dtype, flags.rounds, peer, Path(folder), rows, absent)
    return {"device": device_name(), "cores": cores(), "rounds": flags.rounds, "rows": rows, "absent": absent}


def main(args: list[str] | None = None) -> int:
    """Measures, prints, and returns 0, or 2 after an error that a person can mend; saves nothing."""
    return run_bench("bench.peers", __doc__, PeersFlags, measure_peers, args)


if __name__ == "__main__":
    sys.exit(main())

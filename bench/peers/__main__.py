"""Measures training beside PyTorch, `generate` beside transformers and serving beside llama.cpp, each pair in one run.

    python -m bench.peers                                 training and inference, with the peers of this Python
    python -m bench.peers --peer-python peers/bin/python  peers that live in an environment of their own
    python -m bench.peers --of serving                    prefill, decoding of 1, 8 and 32 streams, and chat, as the server does
    python -m bench.peers --quick                         small shapes, fewer tokens and rounds

A peer is a process that computes the same from the same weights: the extra `peers` installs them. It and we run in turns, with
all cores, so that what else this machine does hits both alike. A ratio is our time over the peer's, below 1 where Thrice takes
less; of serving it is our tokens a second over the peer's.
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
    of: tuple[Literal["training", "inference", "serving"], ...] = ("training", "inference")
    shape: str = "6x384x256x16"
    """Of training: LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    preset: str = "smollm2-135m"
    """Of inference: the architecture, with random weights."""
    model: str = "smollm2-135m-instruct"
    """Of serving: a .gguf file, or that named model."""
    prompt: int = 256
    """Tokens of a prompt in the prefill rows of inference; the decode rows have 64."""
    new: int = 97
    """Tokens to generate in the decode rows; the first one counts as prefill in those of serving."""
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """Of training and inference."""
    keys_values: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """The type of the KV cache in serving."""
    price: float = 0.10
    """Dollars an hour of this machine; the default is about what two shared cores are let for."""
    rounds: int = 9
    """Interleaved rounds, at least 6; the median counts."""
    quick: bool = False
    """Small shapes, bfloat16 alone, 33 tokens and 6 rounds, unless another value is given."""


QUICK: Json = {"shape": "2x128x64x8", "preset": "demo", "prompt": 64, "new": 33, "dtypes": ("bfloat16",), "rounds": 6}


def measure_peers(flags: PeersFlags) -> Json:
    """Measures the rows beside the peers that are installed, prints them, and returns the document."""
    if flags.quick:
        flags = override_defaults(flags, QUICK)
    shape = parse_shape("--shape", flags.shape)
    check_rounds(flags.rounds)
    for name, value, least in (("prompt", flags.prompt, 1), ("new", flags.new, 2)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}.")
    if not flags.dtypes or not flags.of:
        raise UserError("--dtypes needs bfloat16, float32 or both, and --of training, inference, serving or some of them.")
    start_jax(one_arena="serving" not in flags.of)
    from bench.peers import measure
    from bench.peers.serving import measure_streams

    if "inference" in flags.of:
        measure.check_preset(flags.preset, flags.prompt, flags.new)
    print(f"{device_name()}, {cores()} cores, {flags.rounds} interleaved rounds")
    print("a ratio is our time over the peer's; of serving, the peer's over ours")
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
        for script, add_rows in (stages[stage] for stage in stages if stage in flags.of):
            with start_peer(flags.peer_python, script, absent) as peer:
                for dtype in flags.dtypes if peer else ():
                    add_rows(dtype, flags.rounds, peer, Path(folder), rows, absent)
    if "serving" in flags.of:
        measure_streams(
            flags.model, flags.peer_python, rows, absent, new=flags.new, rounds=flags.rounds, price=flags.price,
            keys_values=flags.keys_values,
        )  # fmt: skip
    return {"rows": rows, "absent": absent}


def main(args: list[str] | None = None) -> int:
    """Measures, prints, and returns 0, or 2 after an error that a person can mend; saves nothing."""
    return run_bench("bench.peers", __doc__, PeersFlags, measure_peers, args)


if __name__ == "__main__":
    sys.exit(main())

"""Measures training beside PyTorch, serving beside llama.cpp, each pair in one run, objectives beside TRL's.

    python -m bench.peers                                 training, with the peer of this Python
    python -m bench.peers --peer-python peers/bin/python  peers that live in an environment of their own
    python -m bench.peers --of serving                    prefill, decoding of 1, 8 and 32 streams, and chat, as the server does
    python -m bench.peers --of sizes                      three rows of it at 135 M, 0.5 B and 1 B, in four formats
    python -m bench.peers --of mistral                    one stream beside mistral.rs, the second peer of serving
    python -m bench.peers --of losses                     20 steps of each objective beside TRL's, within 1e-4 in float32
    python -m bench.peers --quick                         a small shape, fewer tokens and rounds

A peer is a process that computes the same from the same weights; bench/peers/requirements.txt says
how to install them. It and we run in turns, with all cores, so that what else this machine does
hits both alike. A ratio is our tokens a second over the peer's.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Literal

from bench.cli import check_rounds, parse_shape, run_bench
from bench.machine import Json, family
from bench.peers.mkl import answer_for_mkl
from bench.peers.process import start_peer
from engine.device import device_name, start_jax
from engine.errors import UserError
from engine.processor import cores


@dataclasses.dataclass(frozen=True)
class PeersFlags:
    """Which comparisons, at which shapes, and where the peers live."""

    peer_python: Path | None = None
    """The Python that has the peers, when it is not this one."""
    of: tuple[Literal["training", "serving", "sizes", "mistral", "losses"], ...] = ("training",)
    shape: str = "6x384x256x16"
    """Of training: LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """Of training."""
    model: str = "smollm2-135m-instruct"
    """Of serving: a .gguf file, or that named model."""
    new: int = 97
    """Tokens to generate in the decode rows of serving; the first one counts as prefill."""
    rows: tuple[str, ...] = ()
    """Of serving and sizes: these alone, such as decode_8_after_2048 or repeating; by default all, or three."""
    rounds: int = 9
    """Interleaved rounds; the median counts, and from 6 on it has an interval."""
    quick: bool = False
    """A small shape in bfloat16, 33 tokens and 6 rounds; fewer rows of serving."""


def measure_peers(flags: PeersFlags) -> Json:
    """Measures the rows beside the peers that are installed, prints them, and returns the document."""
    if flags.quick:
        flags = dataclasses.replace(flags, shape="2x128x64x8", dtypes=("bfloat16",), new=33, rounds=6)
    shape = parse_shape("--shape", flags.shape)
    check_rounds(flags.rounds)
    if not flags.dtypes or not flags.of:
        raise UserError(
            "--dtypes needs bfloat16, float32 or both, and --of training, serving, sizes, mistral or losses."
        )
    start_jax(one_arena=not {"serving", "sizes", "mistral"}.intersection(flags.of))
    from bench.peers.losses import compare_losses
    from bench.peers.serving import check_new, choose_rows, measure_streams
    from bench.peers.sizes import measure_mistral, measure_sizes
    from bench.peers.training import measure_training

    names = choose_rows(flags.rows, flags.quick)
    check_new(flags.new)
    # OpenMP's threads meet after every operation, and one that is put aside holds up all: beside
    # other work the same row of training read 2.5 at a load of 9 and 0.9 in a quiet moment.
    bars_hold = f"The bars hold on two quiet cores with {family()}."
    print(f"{device_name()}, {cores()} cores, {flags.rounds} interleaved rounds. {bars_hold}")
    rows: list[Json] = []
    peers: list[Json] = []
    if "training" in flags.of:
        with (
            tempfile.TemporaryDirectory() as folder,
            answer_for_mkl() as preload,
            start_peer(flags.peer_python, "torch_peer.py", preload=preload) as peer,
        ):
            if peer:
                for dtype in flags.dtypes:
                    rows += measure_training(shape, dtype, flags.rounds, peer, Path(folder))
                peers.append(peer.ask(about="build"))  # it says the threads, which are set by now
    if "losses" in flags.of:
        with (
            tempfile.TemporaryDirectory() as folder,
            start_peer(flags.peer_python, "trl_peer.py", "trl", "trl torch") as peer,
        ):
            if peer:
                peers.append(peer.ask(about="build"))
                rows += compare_losses(peer, Path(folder))
    if {"serving", "sizes"}.intersection(flags.of):
        with start_peer(flags.peer_python, "llama_cpp_peer.py", "llama_cpp", "llama-cpp-python") as peer:
            if peer:
                peers.append(peer.ask(about="build"))
            if "serving" in flags.of:
                rows += measure_streams(
                    flags.model, peer, new=flags.new, rounds=flags.rounds, names=names, about={}
                )
            if "sizes" in flags.of and peer:
                rows += measure_sizes(peer, flags.rounds, flags.rows)
    if "mistral" in flags.of:
        with start_peer(flags.peer_python, "mistral_peer.py", "mistralrs", "mistralrs") as peer:
            if peer:
                peers.append(peer.ask(about="build"))
                rows += measure_mistral(peer, flags.new, flags.rounds)
    return {"rows": rows, "peers": peers, "bars_hold": bars_hold}


if __name__ == "__main__":
    sys.exit(run_bench("bench.peers", __doc__, PeersFlags, measure_peers))

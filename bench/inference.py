"""Measures serving on a CPU beside llama.cpp, in one run: prefill, decoding of 1, 8 and 32 streams, and chat.

    python -m bench.inference                                 with the peer of this Python (the extra `peers`)
    python -m bench.inference --peer-python peers/bin/python  a peer that lives in an environment of its own
    python -m bench.inference --quick                         fewer tokens and rounds, about five minutes

Both read the same GGUF file and prompts with all cores, in turns, greedily; ours through `Slots` as the server runs it, with
int8 weights. A ratio is our tokens a second over the peer's, both of the median round. Each row has the slots that it can use,
and is timed while all its streams are under way; those of one are timed without the kernel in C too. The rows `ordinary` and
`repeating` are one stream of chat on the prompts of `streams/prompts.toml`, speculative (the default) and not.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from bench.cli import Json, check_rounds, override_defaults, run_bench
from engine.device import start_jax
from engine.errors import UserError

MAX_NEW_TOKENS = 800  # the first stream decodes more
QUICK = {"new": 33, "rounds": 6}


@dataclasses.dataclass(frozen=True)
class InferenceFlags:
    model: str = "smollm2-135m-instruct"
    """A .gguf file, or that named model."""
    peer_python: Path | None = None
    """The Python that has llama-cpp-python, when it is not this one."""
    new: int = 97
    """Tokens to decode in the decode rows; the first one counts as prefill."""
    rounds: int = 9
    """Interleaved rounds, at least 6."""
    price: float = 0.10
    """Dollars an hour of this machine; the default is about what two shared cores are let for."""
    keys_values: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """The type of the KV cache."""
    quick: bool = False
    """33 tokens and 6 rounds, unless another value is given."""


def measure_inference(flags: InferenceFlags) -> Json:
    if flags.quick:
        flags = override_defaults(flags, QUICK)
    if not 2 <= flags.new <= MAX_NEW_TOKENS:
        raise UserError(f"--new must lie between 2 and {MAX_NEW_TOKENS}, not {flags.new}.")
    check_rounds(flags.rounds)
    start_jax(one_arena=False)
    from bench.streams.slot_streams import measure_streams

    return measure_streams(
        flags.model, flags.peer_python, new=flags.new, rounds=flags.rounds, price=flags.price, keys_values=flags.keys_values
    )


if __name__ == "__main__":
    sys.exit(run_bench("bench.inference", __doc__, InferenceFlags, measure_inference))

"""Serving from a CPU beside llama.cpp, in one run: reading a prompt, and saying tokens to 1, 8 and 32 at a time.

    python -m bench.inference                                      with the peer of this Python (the extra `peers`)
    python -m bench.inference --peer-python peers/bin/python       a peer that lives in an environment of its own
    python -m bench.inference --quick                              fewer tokens and rounds, about a minute

Both read the same GGUF file and the same prompts with all cores, in turns, greedily; ours through `Slots` as the server
runs it, with int8 weights. Ratios are tokens a second over the peer's, above 1 where Thrice is faster, as the median of
the ratios within each round. `decode_1` is a lone stream with speculative decoding, as it is by default: rows that nobody
needs check draft tokens, which changes no token and is right where a text repeats itself. `decode_1_plain` is the same
without draft tokens; the other rows have none. Each row has the slots that it can use, and is timed while all of its
streams are being answered. The last line is JSON.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from bench.cli import check_rounds, quick, run_bench
from engine.device import start_jax
from engine.errors import UserError

MOST = 800  # tokens to decode: the stream that was read first says more
QUICK = {"new": 33, "rounds": 3}


@dataclasses.dataclass(frozen=True)
class InferenceFlags:
    model: str = "smollm2-135m-instruct"
    """A .gguf file, or that named model."""
    peer_python: Path | None = None
    """The Python that has llama-cpp-python, when it is not this one."""
    new: int = 97
    """Tokens to decode in the decode rows; the first one counts as read, not as decoded."""
    rounds: int = 5
    """Interleaved rounds, at least 3."""
    price: float = 0.10
    """Dollars an hour of this machine; the default is about what two shared cores are let for."""
    keys_values: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """The type of the KV cache."""
    quick: bool = False
    """33 tokens and 3 rounds, unless another value is given."""


def measure_inference(flags: InferenceFlags) -> dict[str, Any]:
    """Measures all rows, prints them as they come, and returns the document."""
    if flags.quick:
        flags = quick(flags, QUICK)
    if not 2 <= flags.new <= MOST:
        raise UserError(f"--new must lie between 2 and {MOST}, not {flags.new}.")
    check_rounds(flags.rounds)
    start_jax(decodes=True)
    # JAX is imported from here on: --help needs none, and the allocator is set before it starts.
    from bench.slot_streams import measure_streams

    return measure_streams(
        flags.model, flags.peer_python, new=flags.new, rounds=flags.rounds, price=flags.price, keys_values=flags.keys_values
    )


if __name__ == "__main__":
    sys.exit(run_bench("bench.inference", __doc__, InferenceFlags, measure_inference))

"""Measures int8's cost in quality: bits per byte of a text with int8 weights, and with int8 keys and values.

    python -m bench.quantisation                             smollm2-135m-instruct on 48 kB of held-out plays
    python -m bench.quantisation --model runs/NAME --size 0  a run of your own, on all of them
    python -m bench.quantisation --leaves                    each kind of matrix alone as well: which ones cost most

All read the same windows of the same text. The rounding error is given for each kind of matrix, and with --json for
each path.
"""

import dataclasses
import sys
from pathlib import Path

from bench.cli import Json, run_bench
from engine.device import start_jax
from engine.errors import UserError

LEAST_WINDOW = 128  # tokens


@dataclasses.dataclass(frozen=True)
class QuantisationFlags:
    """Flags; `leaves` also measures bits per byte with each kind of matrix alone in int8."""

    model: str = "smollm2-135m-instruct"
    """A run folder, a Hugging Face folder, a .gguf file or smollm2-135m-instruct."""
    text: Path | None = None
    """A file of text; by default the two plays that no run trains on."""
    size: int = 48_000
    """Bytes of it to read, from its start; 0 reads all."""
    window: int = 512
    """Tokens a window, at most the model's context; each is read once."""
    rows: int = 4
    """Windows read together."""
    leaves: bool = False
    """Measure each kind of matrix alone in int8, too."""


def measure_quantisation(flags: QuantisationFlags) -> Json:
    if flags.window < LEAST_WINDOW or flags.rows < 2 or flags.size < 0:
        raise UserError(f"--window must be at least {LEAST_WINDOW}, --rows at least 2, and --size 0 or more.")
    start_jax()
    from bench.int8_loss import measure_int8

    return measure_int8(flags.model, flags.text, size=flags.size, window=flags.window, rows=flags.rows, each_kind=flags.leaves)


if __name__ == "__main__":
    sys.exit(run_bench("bench.quantisation", __doc__, QuantisationFlags, measure_quantisation))

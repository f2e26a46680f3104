"""Shows what a step holds over time: training, LoRA, half frozen, checkpointing, prefill and decode, from what XLA compiled.

    python -m bench.anatomy                           a small model; the bytes that each program holds, by kind
    python -m bench.anatomy --preset tiny --out DIR   also writes DIR/anatomy.html, the same as pictures
    python -m bench.anatomy --model RUN               the shape of a run folder, a file or smollm2-135m-instruct

The bytes are those that XLA assigned to the values of the program, each from the operation that makes it to the last that
reads it. The NumPy model of `engine/by_hand` then runs once, and what it holds is measured after each half of a block.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from bench.cli import Json, print_table, run_bench
from engine.device import start_jax
from engine.format import ABSENT, si


@dataclasses.dataclass(frozen=True)
class AnatomyFlags:
    preset: str = "demo"
    """The architecture."""
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: the preset)")] = None
    """A run folder, a step folder in it, a Hugging Face folder, a .gguf file or smollm2-135m-instruct."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: no page)")] = None
    """A folder for anatomy.html and anatomy.json."""


def measure_anatomy(flags: AnatomyFlags) -> Json:
    """Prints the summary, writes the page and returns the document."""
    start_jax()
    from bench.anatomy.measure import anatomy
    from bench.anatomy.page import write_page
    from bench.models import find_model

    document = anatomy(find_model(flags.preset, flags.model))
    print_summary(document)
    if flags.out:
        print(f"the page: {write_page(flags.out, document)}", file=sys.stderr)
    return document


def print_summary(document: Json) -> None:
    """Prints what each step holds at its peak, how long it takes, and what a block keeps."""
    from bench.report.templates import environment

    size = lambda bytes: si(bytes, "B") if bytes else ABSENT
    held = [
        [row["program"], *map(size, (row["start_bytes"], row["peak_bytes"], *row["peak"].values())), f"{row['holes']:.1%}"]
        for row in document["rows"]
    ]  # fmt: skip
    heads = "program before peak parameters optimizer cache gradients residuals temporaries holes"
    print_table(
        f"What a step of {document['model']} holds; holes: the share of XLA's own peak that nothing fills", heads.split(), held
    )
    print(environment().get_template("summary.md.j2").render(document))


if __name__ == "__main__":
    sys.exit(run_bench("bench.anatomy", __doc__, AnatomyFlags, measure_anatomy))

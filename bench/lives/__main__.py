"""Records the three lives of one model as a page to watch: it is trained, fine-tuned three ways, and asked.

    python -m bench.lives                            the demo on Shakespeare: lives/lives.html, in four minutes on two cores
    python -m bench.lives --preset nano --out page   another architecture, in another folder
    python -m bench.lives --price 0.20 --watts 90    what this machine costs an hour, and what it draws

The runs are commands that a person types, with --record. Then the trained model answers 100
requests, and its weights are compared with those before, to the bit. lives.json has every figure of
the page.
"""

import dataclasses
import math
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from bench.cli import run_bench
from bench.machine import Json
from bench.pages import write_page
from bench.terminal import print_table, progress
from engine.device import start_jax
from engine.errors import UserError
from engine.format import si, times
from engine.model.config import preset


@dataclasses.dataclass(frozen=True)
class LivesFlags:
    preset: str = "demo"
    """The architecture."""
    data: str = "shakespeare"
    """The text to train on: shakespeare, python, or a file. It is fine-tuned on `voice`, which comes with this project."""
    price: Annotated[float, tyro.conf.arg(metavar="DOLLARS")] = 0.10
    """Dollars an hour of this machine."""
    watts: float | None = None
    """Watts that this machine draws."""
    quick: bool = False
    """Runs of a few seconds, which learn little: all of it in about a minute."""
    out: Path = Path("lives")
    """A folder for lives.html and lives.json."""


def measure_lives(flags: LivesFlags) -> Json:
    """Records the lives, prints the costs and returns the document. Raises UserError where a run
    fails.
    """
    for name in ("price", "watts"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} must be a number above 0, not {value:g}.")
    # as Ctrl-C: the run that goes on ends too, and its folder
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    preset(flags.preset)  # raises for a name that is not known, before JAX starts
    start_jax()
    from bench.lives.recording import answer_requests, measure_costs, record_lives
    from engine.storage.model_loader import load_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lives = record_lives(flags.preset, flags.data, folder, flags.quick)
        progress("asking the trained model")
        model = load_model(str(folder / "train"))
        answer = answer_requests(model, lives["train"]["begin"]["prompt"])
        progress("measuring a step of each life, interleaved")
        cost, memory = measure_costs(model, folder, flags.quick)
    for life, over_time in memory.items():
        (lives | {"answer": answer})[life]["memory"] = over_time
    document: Json = {
        "params": answer["of"],
        "layers": model.cfg.layers,
        "width": model.cfg.width,
        "vocab": model.cfg.vocab,
        "lives": lives,
        "answer": answer,
        "cost": cost,
        "predicted": [3, 2, 1],
    }
    print_summary(document)
    return document


def print_summary(document: Json) -> None:
    """Prints what each life costs, and what answering changed."""
    rows = [
        (
            row["stage"],
            times(row["counted_ratio"]),
            times(row["time_ratio"]),
            si(row["bytes"], "B"),
            row["passes"],
        )
        for row in document["cost"]
    ]
    print_table(
        f"A model of {document['params']:,} parameters", ("", "operations", "time", "peak", "passes"), rows
    )
    answer = document["answer"]
    print(
        f"{answer['changed']:,} of {answer['of']:,} weights changed in answering {answer['asked']} requests."
    )
    print(f"SHA-256 before {answer['before']}\n        after  {answer['after']}")


def write_lives(source: Path, _: Json) -> Path:
    return write_page(source, "lives.html")


if __name__ == "__main__":
    sys.exit(run_bench("bench.lives", __doc__, LivesFlags, measure_lives, write_pages=write_lives))

"""Measures the stage table: what each stage of a model's life costs here: operations, seconds, bytes, money.

    python -m bench                                one model, one run, about two minutes on two cores
    python -m bench --out report                   a minute more: report.html, with pictures, and two of them as files
    python -m bench --model smollm2-135m-instruct  a model of your own instead of a shape with random weights
    python -m bench --quick --json                 fewer rounds; nothing but a line of JSON on stdout
    python -m bench --checks                       the device beside the processor: same numbers, no request affects another
    python -m bench --list                         the other measurements
    python -m bench compare A/bench.json B/bench.json    two results, by the ratios that both measured

All rows run interleaved, so their ratios are of the same minutes. Operations are counted three
times: by formula, by walking the traced program, by XLA.
"""

import dataclasses
import itertools
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from bench import compare
from bench.cli import run_bench
from bench.machine import Json
from bench.pages import LOG_CHARTS, write_page
from engine.device import start_jax
from engine.errors import UserError

PAGE = Path(__file__).parent / "stages" / "page"
QUESTIONS = {
    "What does this machine reach?": ("step",),
    "What does my model take, and give?": ("model", "plan", "serving", "documents", "tones"),
    "How does it stand beside others?": ("peers",),
}
OTHERS = "For those who change the code"
PARTS = [PAGE / "report.html", PAGE / "report.css", *LOG_CHARTS, PAGE / "report.js"]


@dataclasses.dataclass(frozen=True)
class StageTableFlags:
    preset: str = "nano"
    """A shape, with random weights."""
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: the preset)")] = None
    """A run or step folder, a Hugging Face folder, a .gguf file, ORG/NAME on the hub, or a named model."""
    batch: int = 8
    """Sequences a training step sees, and prompts that are prefilled together."""
    context: int = 256
    """Tokens of each, and of the KV caches in decoding."""
    price: Annotated[float, tyro.conf.arg(metavar="DOLLARS")] = 0.1
    """Dollars an hour of this machine; the default is about what two shared cores are let for."""
    max_time: float = 120.0
    """Seconds to fit the whole into, compiling included. Rounds are added while they fit; 6 are made even if they do not."""
    quick: bool = False
    """The fewest rounds that a verdict needs."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: no report)")] = None
    """A folder for report.html, stages.svg, passes.svg and bench.json. With documents.json in it, the claim of that too."""
    checks: bool = False
    """Hold the device's numbers against the processor's instead; exit code 1 when one is too far off."""
    list: bool = False
    """Name the other measurements and stop."""


def measure(flags: StageTableFlags) -> Json:
    """Measures the stage table, or lists the measurements."""
    if flags.list:
        names = measurements()
        print_measurements(names)
        return {"measurements": names}
    check_flags(flags)
    platforms = os.environ.get("JAX_PLATFORMS")
    if flags.checks and platforms and "cpu" not in platforms:
        # to compare with: the first that is named computes
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"
    start_jax()
    if flags.checks:
        from bench.stages.checks import measure_checks

        return measure_checks()
    from bench.stages.measure import stage_table
    from bench.stages.report import print_stages

    fields = ["model" if flags.model else "preset"]
    for field in ("batch", "context", "price"):
        if getattr(flags, field) != getattr(StageTableFlags, field):
            fields.append(field)
    words = [f"--{field} {shlex.quote(str(getattr(flags, field)))}" for field in fields]
    document = stage_table(
        flags.preset,
        flags.model,
        batch=flags.batch,
        context=flags.context,
        price=flags.price,
        max_time=flags.max_time,
        fewest_rounds=flags.quick,
        pictures=bool(flags.out),
        command=" ".join(("python -m bench", *words)),
    )
    if flags.out:
        others = flags.out / "documents.json"
        if others.is_file():
            document["claims"] += compare.read_result(others).get("claims", [])
    print_stages(document)
    return document


def write_report(source: Path, document: Json) -> Path | None:
    """Writes report.html beside the table's document, and two pictures for READMEs; none of a
    document that holds no table.
    """
    if "rows" not in document:
        return None
    from bench.stages.report import write_pictures

    write_pictures(source.parent, document)
    return write_page(source, "report.html", *PARTS)


def check_flags(flags: StageTableFlags) -> None:
    """Raises UserError for a flag out of range."""
    for name, value in (("price", flags.price), ("max-time", flags.max_time)):
        if not 0 < value < math.inf:
            raise UserError(f"--{name} must be a number above 0, not {value:g}.")
    if flags.batch < 2 or flags.batch % 2 or flags.context < 64 or flags.context % 64:
        raise UserError(
            "--batch must be even and at least 2, for preferences come in pairs, "
            f"and --context a multiple of 64, the tokens of a prefill: got {flags.batch} and {flags.context}."
        )


def print_measurements(names: dict[str, str]) -> None:
    """Prints the other measurements by the questions that they answer; `names`: of
    `measurements`."""
    grouped = {*itertools.chain.from_iterable(QUESTIONS.values())}
    width = max(map(len, names))
    for question, group in (QUESTIONS | {OTHERS: sorted(names.keys() - grouped)}).items():
        print(f"{question}:")
        for name in group:
            print(f"  python -m bench.{name:<{width}}  {names[name]}")


def measurements() -> dict[str, str]:
    """Returns the other measurements by name with the first line of their docstrings, without
    importing them.
    """
    names = {}
    here = Path(__file__).parent
    for path in {*here.glob("*.py"), *here.glob("*/__main__.py")} - {Path(__file__)}:
        source = path.read_text(encoding="utf-8")
        if "\nif __name__ ==" in source:
            if path.parent == here:
                name = path.stem
            else:
                name = path.parent.name
            names[name] = source.partition("\n")[0].strip('"')
    return dict(sorted(names.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(
            run_bench("bench compare", compare.__doc__, compare.CompareFlags, compare.compare, sys.argv[2:])
        )
    sys.exit(run_bench("bench", __doc__, StageTableFlags, measure, write_pages=write_report))

"""The stage table: what each stage of a model's life costs on this machine, in operations, seconds, bytes and money.

    python -m bench                                    one model, one run, about two minutes on two cores
    python -m bench --out report                       also writes report.html, with plots, and stages.svg and .md
    python -m bench --model smollm2-135m-instruct      a model of your own instead of a shape with drawn weights
    python -m bench --quick --json                     fewer rounds; nothing but the JSON document on stdout
    python -m bench --list                             the other measurements

Each row runs in turns with all others, so their ratios are of the same minutes. Operations are counted three times: by
formula, by walking the traced program, by XLA. The last line of stdout is one JSON document.
"""

import ast
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.cli import run
from engine.errors import UserError


def dollars(text: str) -> float:
    """A price on the command line. Raises UserError for what is no number; what the number may be is checked later."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--price must be a number above 0, in dollars an hour, such as 0.10; got {text!r}.") from None


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured, and at what price."""

    preset: str = "nano"
    """A shape, with weights drawn at random."""
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: the preset)")] = None
    """A run folder, a step folder in it, a Hugging Face folder, a .gguf file or smollm2-135m-instruct."""
    batch: int = 8
    """Sequences a training step sees, and prompts that are read together."""
    context: int = 256
    """Tokens of each, and of the caches that decoding reads."""
    price: Annotated[str, tyro.conf.arg(metavar="DOLLARS")] = "0.10"
    """Dollars an hour of this machine; the default is about what two shared cores are let for."""
    max_time: float = 120.0
    """Seconds the whole may take, compiling included; rounds are added while they fit."""
    quick: bool = False
    """The fewest rounds that show a spread."""
    json: bool = False
    """Print nothing but the JSON document."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: no report)")] = None
    """A folder for report.html, its first figure as stages.svg, and stages.md."""
    list: bool = False
    """Name the other measurements and stop."""


def measurements() -> dict[str, str]:
    """Every measurement with the first line of its docstring, read without importing it."""
    found = {}
    here = Path(__file__).parent
    for path in [*here.glob("*.py"), *here.glob("*/__main__.py")]:
        source = path.read_text(encoding="utf-8")
        name = path.stem if path.parent == here else path.parent.name
        if "\nif __name__ ==" in source and path != Path(__file__):
            found[name] = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    return dict(sorted(found.items()))


def measured(flags: Flags) -> dict[str, Any]:
    """The document of the stage table, or with --list the names of the other measurements."""
    if flags.list:
        found = measurements()
        width = max(map(len, found))
        for name, line in found.items():
            print(f"  python -m bench.{name:<{width}}  {line}")
        return {"measurements": found}
    from bench.table.measure import Asked, stage_table
    from bench.table.print import show

    names = (field.name for field in dataclasses.fields(Asked))
    document = stage_table(Asked(**{name: getattr(flags, name) for name in names} | {"price": dollars(flags.price)}))
    if not flags.json:
        show(document)
    if flags.out:
        from bench.report.page import write_report

        print(f"the report: {write_report(flags.out, document)}", file=sys.stderr)
    return document


def main(args: list[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    return run("bench", __doc__, Flags, measured, args)


if __name__ == "__main__":
    sys.exit(main())

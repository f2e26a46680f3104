"""Draws two pictures of the stage table for READMEs: the operations of each stage, and the passes of three of them."""

from pathlib import Path

import jinja2

from bench.cli import Json
from engine import format
from engine.files import atomic_file

PAGE = Path(__file__).parent / "page"


def write_pictures(folder: Path, document: Json) -> None:
    """Writes `folder`/stages.svg and passes.svg, each whole or not at all. They follow the reader's light or dark theme."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=jinja2.ChainableUndefined,
        finalize=lambda value: f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value,
    )  # fmt: skip
    templates.filters |= {"times": format.times, "si": format.si}
    for name in ("stages.svg", "passes.svg"):
        with atomic_file(folder / name) as file:
            file.write(templates.get_template(f"{name}.j2").render(document).encode())

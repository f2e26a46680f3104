"""The jinja2 templates of pages: text is escaped in HTML and SVG, numbers are written by engine/format.py."""

from pathlib import Path

import jinja2

from bench.report.charts import svg_number
from engine import format

HERE = Path(__file__).parent


def environment(*folders: Path) -> jinja2.Environment:
    """Returns the templates of these folders, of this one and of bench/anatomy."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, HERE, HERE.parent / "anatomy"]),
        autoescape=lambda name: not (name or "").endswith(".md.j2"), trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, finalize=svg_number, undefined=jinja2.ChainableUndefined,
    )  # fmt: skip
    found.filters |= {
        name: getattr(format, name)
        for name in ("duration", "finite", "si", "in_words", "money", "times", "percent", "quantity")
    }
    return found

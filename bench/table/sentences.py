"""Renders sentences with numbers: jinja2 templates from this folder's .toml files, formatted by engine/format.py."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from engine.format import in_words, money, percent, si, times

_ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined)
_ENVIRONMENT.filters |= {write.__name__: write for write in (in_words, money, percent, si, times)} | {
    "seconds": lambda row: si(row["seconds_per_token"], "s"),
    "nats": lambda bits: f"{float.fromhex(bits):.4f} ({bits})",
}


def read_templates(name: str) -> dict[str, Any]:
    """Returns the tables of the file `name`.toml."""
    return tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text(encoding="utf-8"))


def render(template: str, numbers: Mapping[str, Any]) -> str:
    """Returns the template's sentence. Raises jinja2.UndefinedError for a name that `numbers` lacks."""
    return _ENVIRONMENT.from_string(template).render(numbers)

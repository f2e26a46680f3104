"""Renders sentences with numbers: jinja2 templates from this folder's .toml files, formatted by engine/format.py."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from bench.timing import Ratio
from engine.format import in_words, money, percent, si, times


def ratio(of: Ratio) -> str:
    """Formats a ratio of times with its interval: `1.14× (1.10× to 1.18×)`."""
    return of.format(times)


def share(of: Ratio) -> str:
    """Formats a ratio of times as a share: `31% (30% to 33%)`."""
    return of.format(percent)


_ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined)
_ENVIRONMENT.filters |= {write.__name__: write for write in (in_words, money, percent, ratio, share, si, times)} | {
    "seconds": lambda row: si(row["seconds_per_token"], "s"),
    "nats": lambda bits: f"{float.fromhex(bits):.4f} ({bits})",
}


def read_templates(name: str) -> dict[str, Any]:
    """Returns the tables of the file `name`.toml."""
    return tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text(encoding="utf-8"))


def render(template: str, numbers: Mapping[str, Any]) -> str:
    """Returns the template's sentence. Raises jinja2.UndefinedError for a name that `numbers` lacks."""
    return _ENVIRONMENT.from_string(template).render(numbers)

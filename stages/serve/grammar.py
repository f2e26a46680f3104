"""Grammar: what a request asks its completions to keep to, by the field that names it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from engine.inference.grammars import json_grammar


class Grammar(NamedTuple):
    """The grammar for which the field of a request asks; `make` returns it."""

    field: str
    make: Callable[[], str]


def answer_grammar(field: str, schema: dict[str, Any] | None) -> Grammar:
    """Returns the grammar of JSON that satisfies a schema, or of any object without one."""
    return Grammar(field, partial(json_grammar, schema or {"type": "object"}))

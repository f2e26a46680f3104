"""Writes grammars: of JSON Schemas, choices, patterns and tagged texts, and of Lark and GBNF as others write it.

They are in llguidance's dialect of Lark, and `constraints.GrammarCompiler` compiles them. Imports no jax.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from engine.errors import UserError

# of a grammar: the time to compile a schema grows with the square of its properties, to about 1 s
MAX_BYTES = 65_536
MAX_DEPTH = 100  # of a schema
# of `multipleOf`, without its point: the time to compile it grows with the square
MAX_MULTIPLE = 10_000
# The formats of strings that are enforced. JSON Schema lets any other be a note for people, as
# OpenAPI's `password` is.
FORMATS = frozenset(
    ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
)
# JSON as Python's `json.dumps` writes it. With free white space next to nothing would be forced,
# and a model may write line ends for ever.
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Keywords by which other schemas speak of the same properties, so that an object cannot be closed by itself.
COMPOSING = frozenset(
    (
        "allOf",
        "dependentRequired",
        "dependentSchemas",
        "if",
        "minProperties",
        "not",
        "oneOf",
        "patternProperties",
        "propertyNames",
        "unevaluatedProperties",
    )
)
# Keywords whose value gives schemas by name: a property may be called `enum`, and is no keyword then.
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
VALUES = ("const", "enum")  # keywords whose value is no schema

# The characters that both ECMAScript and Rust's regex crate count as white space, or in a negated class
# those that either does, by the bracket that opened the class of characters, if any.
SPACE_IN_CLASS = {"": r"[ \t\n\r\f\v]", "[": r" \t\n\r\f\v", "[^": r"\s\x{FEFF}"}
# Those that both count as no white space, or in a negated class those that either does.
OTHERS_IN_CLASS = {"": r"[^\s\x{FEFF}]", "[": r"[^\s\x{FEFF}]", "[^": r"\S\x{85}"}


def json_grammar(schema: dict[str, Any]) -> str:
    return f"start: {json_rule(schema)}"


def json_rule(schema: dict[str, Any], lenient: bool = False) -> str:
    """Returns the schema as a part of a rule.

    A keyword that cannot be enforced is ignored if `lenient`, and else refused, here or by the
    compiler. An object has no property that its schema does not name, unless the schema says so: see
    `_close_objects`. Raises UserError for a refused keyword, and for a schema that is nested too
    deeply or has too many bytes.
    """
    options = JSON_OPTIONS | {"lenient": lenient}
    checked = _check_schema(schema, 0, lenient)
    if not _is_composed(checked):
        checked = _close_objects(checked)
    text = json.dumps({**checked, "x-guidance": options}, ensure_ascii=False)
    check_size(text)
    return f"%json {text}"


def check_size(text: str) -> None:
    if len(text.encode()) > MAX_BYTES:
        raise UserError(f"it has more than {MAX_BYTES:,} bytes")


def choice_grammar(choices: Sequence[str]) -> str:
    # a terminal may have thousands, and a rule not
    return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, choices))}"


def regex_grammar(pattern: str) -> str:
    """Returns a grammar of the texts that a pattern matches from beginning to end, in the syntax of
    Rust's regex crate.
    """
    from llguidance import regex_to_lark

    return f"start: /{regex_to_lark(pattern)}/"


def tag_grammar(structures: Sequence[tuple[str, dict[str, Any], str]], triggers: Sequence[str]) -> str:
    """Returns a grammar of texts with structures in them: a beginning, JSON that satisfies a
    schema, and an end.

    Text that has come to one of the `triggers`, with which a structure begins, goes on with a
    structure to its end. Raises UserError for a structure without a trigger, for a trigger without
    a structure, and as `json_rule`.
    """
    rules: dict[str, list[str]] = {trigger: [] for trigger in triggers}
    for begin, schema, end in structures:
        matching = [trigger for trigger in rules if begin.startswith(trigger)]
        if not matching:
            raise UserError(f"no trigger begins the structure {begin[:80]!r}")
        trigger = min(matching, key=len)  # the text comes to it first
        rest = begin.removeprefix(trigger)
        parts = [json_rule(schema)]
        if rest:
            parts.insert(0, json.dumps(rest))
        if end:
            parts.append(json.dumps(end))
        rules[trigger].append(" ".join(parts))
    lines = []
    for number, (trigger, bodies) in enumerate(rules.items()):
        if not bodies:
            raise UserError(f"no structure begins with the trigger {trigger[:80]!r}")
        lines.append(f"tag_{number}: trigger_{number} ({' | '.join(bodies)})")
        lines.append(f"trigger_{number}[lazy]: TEXT {json.dumps(trigger)}")
    names = " | ".join(f"tag_{number}" for number in range(len(rules)))
    return "\n".join([f"start: ({names})* text", "text: TEXT", "TEXT: /(?s:.*)/", *lines])


def lark_grammar(text: str) -> str:
    """Returns a grammar in Lark as it is, and one in llama.cpp's GBNF as Lark. Raises UserError."""
    from llguidance.gbnf_to_lark import any_to_lark

    if "%json" in text:  # llguidance's own; it would pass by the bounds on what a schema costs
        raise UserError("a schema cannot be a part of it (%json): send the schema alone")
    try:
        return any_to_lark(text)
    except Exception as error:
        raise UserError(f"it is neither Lark nor GBNF: {error}") from None


def _check_schema(schema: Any, depth: int, lenient: bool) -> Any:
    """Returns a schema, or a part of one, at this depth, without what need not be enforced. Raises as
    `json_rule`.
    """
    if depth > MAX_DEPTH:
        raise UserError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(schema, list):
        return [_check_schema(value, depth + 1, lenient) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if not _can_enforce_multiple(schema):
        if not lenient:
            multiple = schema["multipleOf"]
            raise UserError(f"multipleOf {multiple} cannot be enforced, for it is 0 or has too many digits")
        schema = {name: value for name, value in schema.items() if name != "multipleOf"}
    if not lenient and not _can_enforce_least(schema):
        least = schema["minProperties"]
        raise UserError(
            f"minProperties {least} cannot be enforced, for a name that is not required may come twice"
        )
    fields: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if name == "pattern" and isinstance(value, str):
            fields[name] = _rust_pattern(value)
        elif name in BY_NAME and isinstance(value, dict):
            schemas = {}
            for key, inner in value.items():
                if name == "patternProperties":
                    key = _rust_pattern(key)
                schemas[key] = _check_schema(inner, depth + 2, lenient)
            fields[name] = schemas
        else:
            inner = _check_schema(value, depth + 1, lenient)
            if name in VALUES:
                inner = value
            fields[name] = inner
    return fields


def _is_composed(schema: Any) -> bool:
    """Whether two schemas may speak of the properties of one object, anywhere in a schema."""
    if isinstance(schema, list):
        return any(map(_is_composed, schema))
    if not isinstance(schema, dict):
        return False
    refers = "anyOf" in schema or "$ref" in schema
    has_own = "properties" in schema or "required" in schema
    if not COMPOSING.isdisjoint(schema) or (refers and has_own):
        return True
    return any(map(_is_composed, schema.values()))


def _close_objects(schema: Any) -> Any:
    """Returns a schema whose objects have only the properties that they name, where they leave that open.

    What satisfies it satisfies the given one too. A small model else adds properties until its
    context is full. llama.cpp, Ollama and xgrammar read schemas so.
    """
    if isinstance(schema, list):
        return [_close_objects(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    fields: dict[str, Any] = {}
    for name, value in schema.items():
        if name in BY_NAME and isinstance(value, dict):
            fields[name] = {key: _close_objects(inner) for key, inner in value.items()}
        elif name in VALUES:
            fields[name] = value
        else:
            fields[name] = _close_objects(value)
    properties = schema.get("properties")
    is_object = schema.get("type") in ("object", ["object", "null"])
    if not is_object or not isinstance(properties, dict) or "additionalProperties" in schema:
        return fields
    required = schema.get("required", [])
    if isinstance(required, list) and all(name in properties for name in required):
        fields["additionalProperties"] = False
    return fields


def _can_enforce_multiple(schema: dict[str, Any]) -> bool:
    multiple = schema.get("multipleOf")
    if isinstance(multiple, int):  # it may be too large for a float
        return 0 < multiple <= MAX_MULTIPLE
    if isinstance(multiple, float):
        return math.isfinite(multiple) and 0 < _digits(multiple) <= MAX_MULTIPLE
    return True


def _can_enforce_least(schema: dict[str, Any]) -> bool:
    """Whether `minProperties` asks for no more than the names that are required, or for one."""
    least = schema.get("minProperties")
    if not isinstance(least, int):
        return True
    required = schema.get("required")
    names: set[str] = set()
    if isinstance(required, list):
        names = {str(name) for name in required}
    return least <= max(1, len(names))


def _rust_pattern(pattern: str) -> str:
    """Returns an ECMAScript pattern, as JSON Schema has them, for Rust's regex crate: texts that
    match it match both.

    White space and line ends are other characters in each: U+0085 is none in ECMAScript, U+FEFF and
    U+2028 are none in Rust.
    """
    parts = []
    inside = ""  # the bracket that opened a class of characters
    for part in re.findall(r"\\.|\[\^?|.", pattern, re.S):
        if part == r"\s":
            parts.append(SPACE_IN_CLASS[inside])
        elif part == r"\S":
            parts.append(OTHERS_IN_CLASS[inside])
        elif part == "." and not inside:
            parts.append(r"[^\n\r\x{2028}\x{2029}]")
        else:
            parts.append(part)
        if part == "]":
            inside = ""
        elif not inside and part in ("[", "[^"):
            inside = part
    return "".join(parts)


def _digits(number: float) -> int:
    """Returns a number without its point: 25 for 0.25."""
    return int(f"{number:.15f}".rstrip("0").replace(".", "") or 0)

"""Structured outputs: the grammars that a body asks for in vLLM's words, or by llama.cpp's `grammar`."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engine.errors import InvalidField, UserError
from engine.inference.grammars import (
    choice_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
    tag_grammar,
)
from stages.serve.api.fields import JsonObject, Several, StopText, StrictFields
from stages.serve.grammar import Grammar

AllowedTexts = Annotated[list[StopText], Meta(min_length=1)]  # of which a completion is to be one


class TagStructure(StrictFields):
    """A part of a text: its beginning, JSON that satisfies the schema, and its end."""

    begin: Annotated[str, Meta(min_length=1, max_length=256)]
    schema: JsonObject = None
    end: Annotated[str, Meta(max_length=256)] = ""


class StructuralTag(StrictFields):
    """A text that goes on with a structure when it has come to a trigger, with which the structure begins."""

    type: Literal["structural_tag"]
    structures: Several[TagStructure] | None = None
    triggers: Several[StopText] | None = None
    format: JsonObject = None


def structural_tag_grammar(tag: str | StructuralTag) -> str:
    """Returns the grammar of a structural tag, or of its JSON text, as vLLM takes it. Raises UserError."""
    if isinstance(tag, str):
        try:
            tag = msgspec.json.decode(tag, type=StructuralTag)
        except msgspec.DecodeError as error:
            raise UserError(f"it is no structural tag: {error}") from None
    if tag.format is not None:
        remedy = "send json, regex, choice or grammar"
        raise UserError(f"only structures with triggers can be enforced, and no format: {remedy}")
    if not tag.structures:
        raise UserError("it has no structures: give at least one, and its trigger")
    return tag_grammar(
        [(each.begin, each.schema or {}, each.end) for each in tag.structures], tag.triggers or ()
    )


def schema_grammar(schema: str | dict[str, Any]) -> str:
    """Returns the grammar of JSON that satisfies a schema, or its JSON text. Raises UserError."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise UserError(f"it is no JSON schema: {error}") from None
    return json_grammar(schema)


def object_grammar(_: bool) -> str:
    return json_grammar({"type": "object"})


STRUCTURED_OUTPUTS: dict[str, Callable[..., str]] = {
    "json": schema_grammar,
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
    "json_object": object_grammar,
    "structural_tag": structural_tag_grammar,
}
GRAMMARS: dict[str, Callable[..., str]] = {
    "guided_json": json_grammar,
    "guided_regex": regex_grammar,
    "guided_choice": choice_grammar,
    "guided_grammar": lark_grammar,
    "grammar": lark_grammar,
}


class StructuredOutputs(StrictFields):
    """The grammar that an answer keeps to, in vLLM's words since 0.12: exactly one of the first six."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: AllowedTexts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | StructuralTag | None = None
    disable_any_whitespace: bool | None = None  # JSON is written without free white space either way
    disable_additional_properties: Literal[False] | None = None
    disable_fallback: bool | None = None  # one library compiles all grammars

    @property
    def own_grammar(self) -> Grammar:
        """The one that is asked for. Raises InvalidField."""
        values = msgspec.structs.asdict(self)
        kinds = [
            kind for kind in STRUCTURED_OUTPUTS if values[kind] is not None and values[kind] is not False
        ]
        if len(kinds) != 1:
            field = "structured_outputs"
            choices = ", ".join(STRUCTURED_OUTPUTS)
            own = " and ".join(kinds) or "none"
            raise InvalidField(field, f"{field} must have exactly one of {choices}, and has {own}.")
        (name,) = kinds
        return Grammar(f"structured_outputs.{name}", partial(STRUCTURED_OUTPUTS[name], values[name]))

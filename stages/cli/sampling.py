"""How a command samples: by its flags, else as its model recommends, else by its own defaults."""

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidField
from engine.inference.request import RANGES
from stages.cli.console import Console

ALL_TOKENS = -1  # of top_k, as transformers spells it; here it is 0


def choose_sampling(
    recommended: Mapping[str, Any],
    flags: Mapping[str, float | None],
    fallback: Mapping[str, float],
    console: Console,
    *,
    penalties: bool = False,
) -> tuple[dict[str, Any], str]:
    """Returns fields of SamplingParams, each by a flag that is not None, else as the model
    recommends, else by `fallback`, and a line that says so.

    Prints what it ignores, as `usable_recommendations` does.
    """
    usable = usable_recommendations(recommended, console, penalties=penalties)
    return merge_by_source({"by a flag": flags, "as the model recommends": usable, "by default": fallback})


def usable_recommendations(
    recommended: Mapping[str, Any], console: Console, *, penalties: bool
) -> dict[str, Any]:
    """Returns those of a model's recommended sampling fields that can be used.

    Prints what it ignores: a value out of range, and a repetition penalty without `penalties`.
    """
    usable: dict[str, Any] = {}
    for name, value in recommended.items():
        try:
            RANGES[name].check(name, value)
            if name == "repetition_penalty" and value != 1 and not penalties:
                raise InvalidField(name, f"{name} is {value:g}, and only `stages.serve` computes it.")
        except InvalidField as error:
            console.print(
                f"Of the sampling that comes with the model one value is ignored: {error}", style="yellow"
            )
            continue
        if name == "top_k" and value == ALL_TOKENS:
            value = 0
        usable[name] = value
    return usable


def merge_by_source(sources: Mapping[str, Mapping[str, float | None]]) -> tuple[dict[str, Any], str]:
    """Merges fields, the first source's first; a None is no value.

    Returns the fields, and a line that names for each the source it came from.
    """
    fields: dict[str, Any] = {}
    parts = []
    for source, values in sources.items():
        new = {name: value for name, value in values.items() if value is not None and name not in fields}
        fields |= new
        if new:
            shown = ", ".join(f"{name} {value:g}" for name, value in new.items())
            parts.append(f"{shown} {source}")
    return fields, "; ".join(parts)

"""Chooses how a model's completions are sampled: a flag wins over what the model recommends, and that over the default."""

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidField
from engine.inference.request import RANGES
from stages.cli.console import Console


def choose_sampling(
    recommended: Mapping[str, Any], flags: Mapping[str, float | None], default: Mapping[str, float], console: Console,
    *, penalties: bool = False,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Returns fields of SamplingParams, each by a flag that is not None, else the model, else default, and a line that says so.

    Ignores, and prints it, what the model recommends out of range, and a penalty without `penalties`, where none is computed.
    """
    usable: dict[str, Any] = {}
    for name, value in recommended.items():
        try:
            RANGES[name].check(name, value)
            if name == "repetition_penalty" and value != 1 and not penalties:
                raise InvalidField(name, f"{name} is {value:g}, and only `stages.serve` computes it.")
            usable[name] = 0 if (name, value) == ("top_k", -1) else value  # all, as transformers spells it
        except InvalidField as error:
            console.print(f"Of the sampling that comes with the model one value is ignored: {error}", style="yellow")
    fields: dict[str, Any] = {}
    parts = []
    for source, values in (("by a flag", flags), ("as the model recommends", usable), ("by default", default)):
        new = {name: value for name, value in values.items() if value is not None and name not in fields}
        fields |= new
        parts += [f"{', '.join(f'{name} {value:g}' for name, value in new.items())} {source}"] if new else []
    return fields, "; ".join(parts)

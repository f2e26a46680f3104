"""Putting what a fine-tuning learnt on the model it learnt it about."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from engine.model.paths import leaf_paths, merge
from engine.storage.adapter import load_adapter
from engine.storage.digest import digest

if TYPE_CHECKING:
    from stages.runs.load import Model

FOLDER = "adapter"  # in a run folder


def with_adapters(model: "Model", folders: Sequence[Path]) -> Any:
    """The model's params with the adapters in `folders` on them, each an adapter's own or a run's; the model's stay as they
    are, and what several adapters add is added up.

    Raises UserError when one is missing, is damaged, or was learnt about other weights (their digest differs).
    """
    params, base = model.params, digest(model.params) if folders else None
    for folder in folders:
        place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
        found = load_adapter(place, base=base).adapters
        strangers = leaf_paths(found).keys() - leaf_paths(params).keys()
        if strangers:
            raise UserError(f"{place} is damaged: it adapts {min(strangers)}, which this model does not have.")
        try:
            params = merge(found, params)
        except ValueError as error:
            raise UserError(f"{place} is damaged: {error}") from None
    return params

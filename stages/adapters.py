"""Putting what a fine-tuning learnt on the model it learnt it about."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.model.paths import merge
from engine.storage.adapter import load_adapter
from engine.storage.digest import digest

if TYPE_CHECKING:
    from stages.load import Model

FOLDER = "adapter"  # in a run folder


def with_adapters(model: "Model", folders: Sequence[Path]) -> Any:
    """The model's params with the adapters in `folders` on them, each an adapter's own or a run's; the model's stay as they
    are, and what several adapters add is added up.

    Raises UserError when one is missing, is damaged, or was learnt about other weights (their digest differs).
    """
    params, base = model.params, digest(model.params) if folders else None
    for folder in folders:
        place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
        params = merge(load_adapter(place, base=base).adapters, params)
    return params

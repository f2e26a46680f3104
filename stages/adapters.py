"""Putting what a fine-tuning learnt on the model it learnt it about."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.storage.adapter import load_adapter

from engine.model.paths import merge
from engine.storage.digest import digest

if TYPE_CHECKING:
    from stages.load import Model

FOLDER = "adapter"  # in a run folder


def with_adapter(model: "Model", folder: Path) -> Any:
    """The model's params with the adapter in `folder`, an adapter's own or a run's, on them; the model's stay as they are.

    Raises UserError when there is none, it is damaged, or it was learnt about other weights (their digest differs).
    """
    place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    return merge(load_adapter(place, base=digest(model.params)).adapters, model.params)

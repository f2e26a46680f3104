"""Ids of models on the Hugging Face hub, ORG/NAME, and where the hub's cache keeps a model."""

import re
from pathlib import Path


def is_hub_id(text: object) -> bool:
    """Whether a text could be the id of an organization's model, by the rules of huggingface_hub's `validate_repo_id`."""
    return (
        isinstance(text, str)
        and bool(re.fullmatch(r"\w[\w.-]{,95}/\w[\w.-]{,95}", text, re.ASCII))
        and not re.search(r"--|\.\.|[-.](/|\Z)|\.git\Z", text)
    )


def cached_id(folder: Path) -> str:
    """Returns ORG/NAME for a folder in the hub's cache, models--ORG--NAME/snapshots/REVISION, else an empty text."""
    snapshots = folder.resolve().parent
    kind, *parts = snapshots.parent.name.split("--")
    hub_id = "/".join(parts)
    return hub_id if (kind, snapshots.name) == ("models", "snapshots") and is_hub_id(hub_id) else ""

"""Describes what became of a GGUF file's matrices: which stay as they are, which are widened or rounded."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from engine.model.config import JOINED
from engine.model.paths import leaf_paths
from engine.model.weights.lora import innermost_base
from engine.model.weights.plain import as_weight
from engine.storage.tensor_layout import DTYPE_NAMES


def describe_kinds(kinds: Mapping[str, str], params: Any) -> str:
    """Returns what became of a GGUF file's matrices, of `file_kinds`: which stay as they are, and
    which are widened or rounded.

    params: the weights in use, where q, k and v, or gate and up, may lie side by side. Returns an
    empty text without kinds.
    """
    leaves = leaf_paths(params)
    groups: dict[str, Counter[str]] = {}  # how many matrices of each kind have come to the same
    for path, kind in kinds.items():
        leaf = innermost_base(leaves[_path_in_use(path, leaves)])
        groups.setdefault(_change_of(kind, leaf), Counter())[kind] += 1
    phrases = []
    for change, counts in sorted(groups.items()):
        count = counts.total()
        names = ", ".join(kind for kind, _ in counts.most_common())
        phrase = f"{_say_change(change, count)} ({names})"
        if len(groups) == 1:
            return f"all {count:,} matrices {phrase}"
        phrases.append(f"{count:,} {phrase}")
    if phrases:
        return f"of {len(kinds):,} matrices {', '.join(phrases)}"
    return ""


def _path_in_use(path: str, leaves: Mapping[str, Any]) -> str:
    """Returns the path of the leaf that holds a matrix: its own, or that of the matrices joined.
    Raises KeyError for a matrix that no leaf can hold.
    """
    if path in leaves:
        return path
    block, _, part = path.rpartition("/")
    for joined, parts in JOINED.items():
        if part in parts:
            return f"{block}/{joined}"
    raise KeyError(f"No leaf of the model holds the matrix {path!r}, alone or joined with others.")


def _say_change(change: str, count: int) -> str:
    if change:
        return f"is {change}" if count == 1 else f"are {change}"
    return "stays as it is" if count == 1 else "stay as they are"


def _change_of(kind: str, leaf: Any) -> str:
    """Returns what became of a matrix of a file's `kind`, now a leaf that is no LoRA; an empty text
    where it stays.
    """
    own = as_weight(leaf).kind
    if DTYPE_NAMES.get(own, own) == kind:
        return ""
    is_wider = own == "float32" or (own == "bfloat16" and kind not in ("F32", "F16"))
    change = "rounded"
    if is_wider:
        change = "widened"
    return f"{change} to {own}"

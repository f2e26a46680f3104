"""The settings of a run in its run.json: which may change when it is resumed, and how they did in words."""

import json
import re
from typing import Any

from engine.errors import UserError
from engine.format import duration
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths

Changes = dict[str, tuple[Any, Any]]  # path in run.json -> (before, now)

# Settings that every run.json has, and that a resumed run may not change: path in run.json -> name.
ALWAYS_THERE = {
    "text/digest": "text",
    "tokenizer/digest": "tokenizer",
    "seed": "seed",
    "recipe/batch": "batch",
    "recipe/context": "context",
    "recipe/optimizer/kind": "optimizer",
}
# All settings that a resumed run may not change, but for those of the architecture (`config/...`).
# Any other setting may change, and run.json notes that it did.
FIXED = ALWAYS_THERE | {
    "base/digest": "base",
    "learns": "choice of trainable parameters",
    "objective": "objective",
    "pack": "packing",
    "stage": "stage",
    "continues": "adapter to continue",
    "mixed_in": "number of general questions mixed in",
}
# Settings of the architecture that a resumed run may change.
CONFIG_MAY_CHANGE = {f"config/{name}" for name in ("dtype", "scan", "remat", "context")}
# Settings that are named like the flag that sets them. A change of one is shown as that flag.
SET_BY_FLAG = re.compile(
    "(recipe|rollout|update)/.*"
    "|config/dtype"
    "|steps|loss|beta|full_loss|keep_last|metric.*|general|no_mix|template"
    "|text/(data|validation)"
)
# Settings that are derived from flags. A change of one is not shown, as that of the flag is.
DERIVED = {"least_steps", "config/scan", "config/remat"}
# Settings that the best checkpoint is chosen by. When one changes, the best is forgotten: its loss
# by the old settings cannot be compared with losses by the new ones.
BEST_CHOSEN_BY = {"text/validation", "text/validation_digest", "loss", "beta"}
# Paths in run.json that are not settings. The flags in `command` give settings, which are compared.
NOT_COMPARED = re.compile("(command|changes|result|general_answers)(/.*)?")


def settings(metadata: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    as_read = json.loads(json.dumps({**metadata, "config": cfg.to_json()}))
    leaves = leaf_paths(as_read)
    return {path: value for path, value in leaves.items() if not NOT_COMPARED.fullmatch(path)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """Returns the settings that differ.

    Leaves out one that only `now` has, unless it is in FIXED or the architecture's: an older version
    did not write it, so whether it changed is not known.
    """
    architecture = [path for path in now if path.startswith("config/")]
    compared_paths = dict.fromkeys([*before, *FIXED, *architecture])  # each once
    changes = {}
    for path in compared_paths:
        if before.get(path) != now.get(path):
            changes[path] = (before.get(path), now.get(path))
    return changes


def refusals(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a phrase for each setting that differs and may not: `width (256 there, 384 now)`.

    Raises UserError for a damaged run.json, which lacks a setting of ALWAYS_THERE.
    """
    if ALWAYS_THERE.keys() - before.keys():
        raise UserError("run.json there is damaged. Give another --out-dir, or --overwrite to begin anew.")
    changes = differences(before, now)
    refused = []
    for path in changes:
        name = _fixed_name(path)
        if name is None:
            continue
        if path == "text/digest" and "seed" in changes:  # the text follows the seed
            continue
        shown_path = _shown_path(path, before, now)
        value_before = before.get(shown_path)
        value_now = now.get(shown_path)
        if value_before != value_now:
            refused.append(f"{name} ({value_before} there, {value_now} now)")
        elif shown_path.endswith(("/data", "/model")):  # the digest alone differs
            refused.append(f"{name} (what is read from {value_before} has changed)")
        else:
            refused.append(name)
    return refused


def _fixed_name(path: str) -> str | None:
    """Returns what people call a setting that a resumed run may not change; None for one that may."""
    if path in CONFIG_MAY_CHANGE:
        return None
    if path in FIXED:
        return FIXED[path]
    if path.startswith("config/"):
        return path.removeprefix("config/")
    return None


def _shown_path(path: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns the setting whose values tell people how the setting `path` differs.

    For a digest that is the setting beside it that says what the digest is of (`text/data` for
    `text/digest`), if there is one. Else it is `path` itself.
    """
    if not path.endswith("/digest"):
        return path
    parent = path.removesuffix("/digest")
    for part in ("data", "kind", "model"):
        described = f"{parent}/{part}"
        if before.get(described) or now.get(described):
            return described
    return path


def describe_changes(changes: Changes) -> list[str]:
    lines = []
    for path, (before, now) in changes.items():
        if path == "text/validation_digest":
            lines.append("what is in the validation data")
        elif path == "max_seconds":
            lines.append(f"--max-time: {_time_limit(before)} -> {_time_limit(now)}")
        elif path == "attention":
            lines.append(
                f"attention {before} -> {now}: "
                f"the next steps are those {before} within rounding, not to the bit"
            )
        elif path not in DERIVED:
            name = path.rpartition("/")[2]
            if SET_BY_FLAG.fullmatch(path):
                name = f"--{name.replace('_', '-')}"
            lines.append(f"{name}: {before} -> {now}")
    return lines


def _time_limit(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return duration(seconds)

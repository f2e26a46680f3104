"""Reads the architecture fields of a config.json or a GGUF file; refuses what cannot be computed, names what is unknown."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.storage.untrusted import quote

# Architecture -> the options of its block that its fields do not state. Mistral's block is Llama's.
BLOCKS: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
MAX_NAMED = 8  # fields that are not known, in a note


def architecture_of(cfg: ModelConfig) -> str:
    """Returns the published architecture with this qkv_bias and qk_norm. Raises UserError when there is none."""
    options = {option: True for option in ("qkv_bias", "qk_norm") if getattr(cfg, option)}
    for name, block in BLOCKS.items():
        if block == options:
            return name
    raise UserError("No published architecture has both qkv_bias and qk_norm, so this model cannot be written for others.")


class Fields(NamedTuple):
    """The fields of a file by name. Errors put `prefix` before a name."""

    values: dict[str, Any]
    path: Path
    prefix: str = ""

    def check(self, only: dict[str, tuple[Any, ...]]) -> None:
        """Raises UserError for a field that is in `only` and whose value is none of those there."""
        for name, values in only.items():
            if name in self.values and self.values[name] not in values:
                given = f"{self.prefix}{name} is {quote(self.values[name])}"
                raise UserError(f"{self.path}: {given}, and only {values[0]} can be computed here.")

    def note_unknown(self, known: Collection[str], harmless: str) -> tuple[str, ...]:
        """Returns a note that names the fields which are not known, if any, and do not match the pattern `harmless`."""
        unknown = [self.prefix + name for name in self.values if name not in known and not re.fullmatch(harmless, name)]
        if not unknown:
            return ()
        more = f" and {len(unknown) - MAX_NAMED} more" * (len(unknown) > MAX_NAMED)
        return (f"{self.path}: fields that are not known here are ignored: {', '.join(map(quote, unknown[:MAX_NAMED]))}{more}",)

    def number[T: (int, float)](self, name: str, kind: type[T], default: T | None = None) -> T:
        """Returns a number field; raises UserError for one that is missing (or null) without a `default`, negative or huge."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.path} does not say {self.prefix}{name}.")
        if type(value) not in (int, kind) or not 0 <= value < 2**40:
            raise UserError(f"{self.path}: {self.prefix}{name} should be one number of ordinary size, not {quote(value)}.")
        return kind(value)

    def flag(self, name: str) -> bool:
        """Returns a boolean field, false by default; raises UserError for anything else."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {self.prefix}{name} should be true or false, not {quote(value)}.")
        return value

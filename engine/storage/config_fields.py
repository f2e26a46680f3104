"""Reads the architecture fields of a config.json or a GGUF file; refuses each that is unsupported."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError, did_you_mean
from engine.model.config import ModelConfig
from engine.storage.untrusted import quote

# Architecture -> the options of its block that its fields do not state. Mistral's block is Llama's.
BLOCKS: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


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

    def check(self, used: Collection[str], only: dict[str, tuple[Any, ...]], ignored: Collection[str]) -> None:
        """Raises UserError for an unknown field, or one with a value other than the supported ones in `only`."""
        known = {*used, *only, *ignored}
        for name, value in self.values.items():
            called = self.prefix + name
            if value not in only.get(name, [value]):
                raise UserError(f"{self.path}: {called} is {quote(value)}, and only {only[name][0]} can be computed here.")
            if name not in known:
                missing = f"is not known here, and what it changes would be missing.{did_you_mean(name, sorted(used))}"
                raise UserError(f"{self.path}: the field {quote(called)} {missing}")

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

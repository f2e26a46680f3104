"""LoadedModel: a model as it was read from disk, whatever kind of file it came from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.model.config import ModelConfig
from engine.text.tokenizer import Tokenizer

Report = Callable[[int, int], None] | None  # called with how much is done, and of how much


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Weights, architecture, and how text becomes tokens for it.

    params: matrices in the dtype asked for (float32 for a run of ours), gains and biases float32. Any of `ends` ends a
    completion, the tokenizer's own first. `checkpoint` is the file or folder that was read, `run` the run folder it lies
    in, if any. `damaged` names, a line a file, the damage in newer checkpoints.
    """

    name: str
    cfg: ModelConfig
    params: Any
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    checkpoint: Path
    run: Path | None = None
    damaged: tuple[str, ...] = ()

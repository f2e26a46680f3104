"""LoadedModel: what a model from elsewhere is once it is read, whatever kind of file it came from."""

import dataclasses
from typing import Any

import tokenizers

from engine.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Weights, architecture, and how text becomes tokens for it.

    params: matrices in the dtype asked for, gains and biases float32. `tokenizer_config` is what Hugging Face keeps in
    tokenizer_config.json: `eos_token`, `bos_token` and `chat_template` among it. The tokenizer's post-processor puts before a
    text what the model wants there; any of `ends` ends a completion, the tokenizer's own first.
    """

    name: str
    cfg: ModelConfig
    params: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    tokenizer_config: dict[str, Any]
    ends: tuple[int, ...]

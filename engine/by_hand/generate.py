"""Greedy generation: the forward pass alone, repeated. No gradient, no weight changes, no KV cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.by_hand.model import forward
from engine.errors import UserError
from engine.model.config import ModelConfig


def generate(
    cfg: ModelConfig, params: Any, prompt: Sequence[int], *, max_tokens: int, eos_id: int | None = None
) -> Iterator[int]:
    """Yields the most probable tokens after the prompt until `eos_id`, `max_tokens`, or a full context.

    Each token computes the whole text again, of which a KV cache (`inference/decode.py`) spares all but the last row.
    Raises UserError for a prompt that is empty or leaves no room.
    """
    if not 0 < len(prompt) < cfg.context:
        raise UserError(f"The prompt has {len(prompt)} tokens; from 1 to {cfg.context - 1} fit a context of {cfg.context}.")
    text = list(prompt)
    for _ in range(min(max_tokens, cfg.context - len(prompt))):
        token = int(forward(cfg, params, np.array([text]))[0, -1].argmax())
        if token == eos_id:
            return
        yield token
        text.append(token)

"""Measures forgetting: bits per byte on a general text before and after fine-tuning."""

import dataclasses

from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.tokenizer import Tokenizer
from stages.cli.console import Console
from stages.runs.conversation_data import ROWS
from stages.runs.text_data import encode_text, evaluation_source
from stages.runs.validation import bits_per_byte, score_text

WINDOW = 256  # tokens scored at once
TOKENS = 8192  # of the text


def general_bits_per_byte(
    cfg: ModelConfig, params: Params, tokenizer: Tokenizer, text: str, context: int, console: Console
) -> float:
    """Returns the bits per byte of the beginning of a named text, in windows of at most `context` tokens."""
    file = encode_text(evaluation_source(text, console), tokenizer, console)
    tokens = file.tokens[: TOKENS + 1]
    size = tokenizer.token_bytes(tokens[1:])
    part = dataclasses.replace(file, tokens=tokens, bytes=size)
    seq = min(WINDOW, context, max(2, len(tokens) - 1))
    return bits_per_byte(score_text(cfg, params, part, seq, seq, ROWS), size)

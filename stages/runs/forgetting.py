"""A text that has nothing to do with what was learnt: how well it is still known is what was not forgotten."""

import dataclasses

from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.tokenizer import Tokenizer
from stages.runs import text_data
from stages.cli.console import Console
from stages.runs.conversation_data import ROWS
from stages.runs.validation import bits_per_byte, score_text

WINDOW = 256  # tokens scored at once
TOKENS = 8192  # of the text


def general_bits_per_byte(cfg: ModelConfig, params: Params, tokenizer: Tokenizer, wanted: str, context: int, console: Console) -> float:
    """Of the beginning of the text that `--general` names, in windows of at most `context` tokens."""
    text = text_data.encode_text(text_data.evaluation_source(wanted, console), tokenizer, console)
    tokens = text.tokens[: TOKENS + 1]
    size = tokenizer.token_bytes(tokens[1:])
    part = dataclasses.replace(text, tokens=tokens, bytes=size)
    seq = min(WINDOW, context, max(2, len(tokens) - 1))
    return bits_per_byte(score_text(cfg, params, part, seq, seq, ROWS), size)

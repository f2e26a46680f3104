"""Bits per byte of a text: on a few windows while training, on all of it by a sliding window, or of a general text.

The last measures forgetting: bits per byte on a general text before and after fine-tuning.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from engine.inference.score import score
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.text.batches import evaluation_count, evaluation_windows
from engine.text.tokenizer import Tokenizer
from engine.text.tokens import TokenFile
from stages.cli.console import Console
from stages.runs.conversation_data import ROWS
from stages.runs.text_data import TextData, encode_text, evaluation_source

QUICK_WINDOWS = 32
GENERAL_WINDOW, GENERAL_TOKENS = 256, 8192  # tokens of a general text: scored at once, and in all
LOGITS = 64 * 2**20  # bytes of float32 logits an evaluation makes at once


def rows_for(cfg: ModelConfig, seq: int) -> int:
    return max(2, min(16, LOGITS // (4 * seq * cfg.vocab)))


def bits_per_byte(nats: float, size: int) -> float:
    """Returns bits per byte from the summed nats over a text of `size` bytes."""
    return nats / math.log(2) / size


def score_text(
    cfg: ModelConfig,
    params: Params,
    text: TokenFile,
    seq: int,
    stride: int,
    rows: int,
    report: Callable[[int, int], None] | None = None,
) -> float:
    """Returns the summed nats of every token of the text but the first, each seen behind seq - stride tokens or more."""
    total, waiting = 0.0, jnp.zeros(())
    count = evaluation_count(len(text.tokens), seq, stride)
    for number, batch in enumerate(evaluation_windows(text.tokens, seq, stride, rows)):
        # One batch ahead: the next is cut while the device works.
        nats = score(cfg, params, batch)
        total += float(waiting)
        waiting = nats
        if report:
            report(min(number * rows, count), count)
    return total + float(waiting)


def general_bits_per_byte(
    cfg: ModelConfig, params: Params, tokenizer: Tokenizer, text: str, context: int, console: Console
) -> float:
    """Returns the bits per byte of the beginning of a named text, in windows of at most `context` tokens."""
    file = encode_text(evaluation_source(text, console), tokenizer, console)
    tokens = file.tokens[: GENERAL_TOKENS + 1]
    size = tokenizer.token_bytes(tokens[1:])
    part = dataclasses.replace(file, tokens=tokens, bytes=size)
    seq = min(GENERAL_WINDOW, context, max(2, len(tokens) - 1))
    return bits_per_byte(score_text(cfg, params, part, seq, seq, ROWS), size)


class TextEvaluator:
    """Evaluates on a fixed few windows, spread over the validation text: comparable with itself, not with the whole text.

    `nats_of` (cfg, params, batch) sums a batch's nats; `rows` windows of `seq` tokens are scored together.
    """

    unit = "bits/byte (quick)"
    key = "quick_val_bits_per_byte"

    def __init__(
        self, cfg: ModelConfig, text: TokenFile, tokenizer: Tokenizer, seq: int, rows: int, nats_of: Callable[..., Any]
    ) -> None:
        self.cfg, self.nats_of = cfg, nats_of
        shape = next(evaluation_windows(text.tokens, seq, seq, rows))
        last = len(text.tokens) - 1 - seq
        self.batches: list[Batch] = [shape]
        if last > 0:
            count = min(QUICK_WINDOWS, max(rows, last // seq))
            starts = np.linspace(0, last, -(-count // rows) * rows).astype(np.int64).reshape(-1, rows)
            self.batches = [self._batch(text, start, shape) for start in starts]
        self.size = sum(tokenizer.token_bytes(np.asarray(b.targets)[np.asarray(b.mask)]) for b in self.batches)

    @staticmethod
    def _batch(text: TokenFile, starts: np.ndarray, shape: Batch) -> Batch:
        at = starts[:, None] + np.arange(shape.tokens.shape[1])
        tokens, targets = text.tokens[at].astype(np.int32), text.tokens[at + 1].astype(np.int32)
        return shape._replace(tokens=tokens, targets=targets, mask=np.ones(at.shape, bool))

    def evaluate(self, params: Params, stopped: Callable[[], bool] = lambda: False) -> float | None:
        """Returns bits per byte; None when it was `stopped` in between."""
        nats = 0.0
        for batch in self.batches:
            if stopped():
                return None
            nats += float(self.nats_of(self.cfg, params, batch))
        return bits_per_byte(nats, max(self.size, 1))


def quick_evaluator(cfg: ModelConfig, data: TextData, nats_of: Callable[..., Any]) -> TextEvaluator:
    """Returns the evaluator on a run's validation text, in windows of its context."""
    return TextEvaluator(cfg, data.validation, data.tokenizer, cfg.context, rows_for(cfg, cfg.context), nats_of)

"""Bits per byte of a text: on a few windows while training, on all of it by a sliding window, or on a general text.

On a general text, those before and after fine-tuning measure forgetting.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from engine.inference.score import score
from engine.mesh.layout import row_shards
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.token_file import TokenFile
from engine.text.tokenizer import Tokenizer
from engine.text.windows import count_windows, evaluation_windows, window_batch
from stages.cli.console import Console, ReportProgress
from stages.runs.stage import Evaluator
from stages.runs.text_data import encode_text, evaluation_source

QUICK_WINDOWS = 32
GENERAL_WINDOW, GENERAL_TOKENS = 256, 8192  # tokens of a general text: scored at once, and in all
EVALUATION_ROWS = 2  # conversations, or windows of a general text, that are scored together
LOGITS = 64 * 2**20  # bytes of float32 logits an evaluation makes at once


def rows_in_memory(cfg: ModelConfig, seq: int) -> int:
    """Returns how many windows, 2 to 16, an evaluation scores together: as many as have logits of LOGITS bytes."""
    return max(2, min(16, LOGITS // (4 * seq * cfg.vocab)))


def bits_per_byte(nats: float, size: int) -> float:
    """Returns bits per byte from the summed nats over a text of `size` bytes."""
    return nats / math.log(2) / size


def score_text(
    cfg: ModelConfig, params: Params, tokens: np.ndarray, seq: int, stride: int, rows: int, report: ReportProgress | None = None
) -> float:
    """Returns the summed nats of every token (N,) of a text but the first, each after seq - stride tokens or more."""
    total, waiting = 0.0, jnp.zeros(())
    rows *= row_shards()
    count = count_windows(len(tokens), seq, stride)
    for number, batch in enumerate(evaluation_windows(tokens, seq, stride, rows)):
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
    """Returns bits per byte on the beginning of a named text, in windows of at most `context` tokens."""
    tokens = encode_text(evaluation_source(text, console), tokenizer, console).tokens[: GENERAL_TOKENS + 1]
    seq = min(GENERAL_WINDOW, context, max(2, len(tokens) - 1))
    with console.task(f"evaluating on {text}", always=True) as report:
        nats = score_text(cfg, params, tokens, seq, seq, EVALUATION_ROWS, report)
    return bits_per_byte(nats, tokenizer.count_bytes(tokens[1:]))


def quick_evaluator(cfg: ModelConfig, text: TokenFile, tokenizer: Tokenizer, nats_of: Callable[..., Any]) -> Evaluator:
    """Returns an evaluator on a fixed few windows of the model's context, spread over the text.

    `nats_of(cfg, params, batch)` sums a batch's nats. Not to be compared with the bits per byte of the whole text. Every mesh
    scores the same windows, each device its own; rows behind the last are not counted.
    """
    seq, rows = cfg.context, rows_in_memory(cfg, cfg.context)
    last = len(text.tokens) - 1 - seq
    if last > 0:
        count = min(QUICK_WINDOWS, max(rows, last // seq))
        starts, shards = np.linspace(0, last, -(-count // rows) * rows).astype(np.int64), row_shards()
        rows = min(rows, -(-len(starts) // shards)) * shards
        first = np.pad(starts, (0, -len(starts) % rows), constant_values=-1).reshape(-1, rows, 1)
        mask = np.broadcast_to(first >= 0, (*first.shape[:2], seq))
        batches = [window_batch(text.tokens, *part) for part in zip(np.maximum(first, 0) + np.arange(seq), mask)]
    else:
        batches = [next(evaluation_windows(text.tokens, seq, seq, rows))]
    size = sum(tokenizer.count_bytes(np.asarray(b.targets)[np.asarray(b.mask)]) for b in batches)
    bits = math.log(2) * max(size, 1)
    return Evaluator(batches, functools.partial(nats_of, cfg), bits, "bits/byte (quick)", "quick_val_bits_per_byte")

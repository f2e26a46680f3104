"""Evaluators: the mean loss on batches held out, and of a text its bits per byte."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from engine.mesh.layout import row_shards
from engine.model.config import ModelConfig
from engine.model.loss import score
from engine.model.transformer import Params
from engine.text.batch import count_windows, evaluation_windows, window_batch
from engine.text.corpus import TokenFile
from engine.text.tokenizer import Tokenizer
from stages.cli.console import Console, ReportProgress
from stages.runs.text_data import encode_text, evaluation_source

QUICK_WINDOWS = 32
GENERAL_WINDOW = 256  # tokens of a general text that are scored at once
GENERAL_TOKENS = 8192  # tokens of it in all
EVALUATION_ROWS = 2  # conversations, or windows of a general text, that are scored together
LOGITS = 64 * 2**20  # bytes of float32 logits an evaluation makes at once


def rows_in_memory(cfg: ModelConfig, seq: int) -> int:
    """Returns how many windows, 2 to 16, are scored together: as many as have logits of LOGITS
    bytes."""
    return max(2, min(16, LOGITS // (4 * seq * cfg.vocab)))


def bits_per_byte(nats: float, size: int) -> float:
    return nats / math.log(2) / size


def score_text(
    cfg: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    seq: int,
    stride: int,
    rows: int,
    report: ReportProgress | None = None,
) -> float:
    """Returns the summed nats of every token (N,) of a text but the first, each after seq - stride
    tokens or more."""
    total = 0.0
    waiting = jnp.zeros(())
    rows *= row_shards()
    count = count_windows(len(tokens), seq, stride)
    for number, batch in enumerate(evaluation_windows(tokens, seq, stride, rows)):
        if report:  # first, because the first batch may compile for a minute
            report(min(number * rows, count), count)
        # One batch ahead: the next is cut while the device works.
        nats = score(cfg, params, batch)
        total += float(waiting)
        waiting = nats
    return total + float(waiting)


def general_bits_per_byte(
    cfg: ModelConfig, params: Params, tokenizer: Tokenizer, text: str, context: int, console: Console
) -> float:
    tokens = encode_text(evaluation_source(text, console), tokenizer, console).tokens[: GENERAL_TOKENS + 1]
    seq = min(GENERAL_WINDOW, context, max(2, len(tokens) - 1))
    with console.task(f"evaluating on {text}", always=True) as report:
        nats = score_text(cfg, params, tokens, seq, seq, EVALUATION_ROWS, report)
    return bits_per_byte(nats, tokenizer.count_bytes(tokens[1:]))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates on held-out batches: the sum of `summed_loss(trainable, batch)` over `size`.

    The mean is called `unit` on screen and `key` in metrics.jsonl.
    """

    batches: Sequence[Any]
    summed_loss: Callable[[Any, Any], Any]
    size: float
    unit: str
    key: str

    def evaluate(
        self,
        trainable: Any,
        report: ReportProgress = lambda *_: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Returns the mean; None when it was `stopped` in between."""
        total = 0.0
        report(0, len(self.batches))  # the first batch may compile for a minute
        for number, batch in enumerate(self.batches, 1):
            if stopped():
                return None
            total += float(self.summed_loss(trainable, batch))
            report(number, len(self.batches))
        return total / self.size


def quick_evaluator(
    cfg: ModelConfig, text: TokenFile, tokenizer: Tokenizer, nats_of: Callable[..., Any]
) -> Evaluator:
    """Returns an evaluator on a fixed few windows of the model's context, spread over the text, the
    same on every mesh.

    `nats_of(cfg, params, batch)` sums a batch's nats. Rows behind the last are not counted.
    """
    seq = cfg.context
    rows = rows_in_memory(cfg, seq)
    last = len(text.tokens) - 1 - seq
    if last > 0:
        count = min(QUICK_WINDOWS, max(rows, last // seq))
        starts = np.linspace(0, last, -(-count // rows) * rows).astype(np.int64)
        shards = row_shards()
        rows = min(rows, -(-len(starts) // shards)) * shards
        first = np.pad(starts, (0, -len(starts) % rows), constant_values=-1).reshape(-1, rows, 1)
        mask = np.broadcast_to(first >= 0, (*first.shape[:2], seq))
        windows = np.maximum(first, 0) + np.arange(seq)
        batches = [
            window_batch(text.tokens, batch_windows, batch_mask)
            for batch_windows, batch_mask in zip(windows, mask)
        ]
    else:
        batches = [next(evaluation_windows(text.tokens, seq, seq, rows))]
    size = 0  # bytes
    for batch in batches:
        size += tokenizer.count_bytes(np.asarray(batch.targets)[np.asarray(batch.mask)])
    return Evaluator(
        batches=batches,
        summed_loss=functools.partial(nats_of, cfg),
        size=math.log(2) * max(size, 1),  # nats by this are bits per byte
        unit="bits/byte (quick)",
        key="quick_val_bits_per_byte",
    )

"""Preference batches with reference margins, and the held-out evaluators of both fine-tuning objectives."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from engine.inference.score import score
from engine.mesh.layout import row_shards
from engine.model.config import ModelConfig
from engine.model.paths import merge
from engine.text.epoch_order import ALL, EpochOrder
from engine.text.examples import Pair
from engine.text.packing import PairBatch, evaluation_batches, evaluation_pairs, pair_batch
from engine.training.preference import Preferences
from engine.training.step import NEXT_TOKEN, Objective
from stages.runs.conversation_data import pair_margins
from stages.runs.stage import Evaluator
from stages.runs.validation import EVALUATION_ROWS


class PreferenceBatches:
    """Batches of pairs, with their margins by a reference, the model before training (`initial`); 0 without `initial`."""

    def __init__(self, cfg: ModelConfig, initial: Any, pairs: Sequence[Pair], seq: int, batch: int, seed: int) -> None:
        self.pairs, self.seq, self.order = pairs, seq, EpochOrder(len(pairs), batch, seed)
        parts = [reference for _, reference in _with_margins(cfg, initial, pairs, seq, batch)]
        self._reference = np.concatenate(parts)[: len(pairs)]
        self.epoch = self.order.epoch

    def at(self, step: int, rows: slice = ALL) -> Preferences:
        part = pair_batch(self.pairs, np.array([index for _, index in self.order.at(step, rows)]), self.seq)
        return Preferences(part.chosen, part.rejected, self._reference[part.pair])


def _with_margins(
    cfg: ModelConfig, initial: Any, pairs: Sequence[Pair], seq: int, rows: int
) -> Iterable[tuple[PairBatch, np.ndarray]]:
    """Returns what `pair_margins` yields; with margins of 0 where `initial` is None: the loss then reads none."""
    if initial is not None:
        return pair_margins(cfg, initial, pairs, seq, rows)
    return ((part, np.zeros(rows, np.float32)) for part in evaluation_pairs(pairs, seq, rows))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summed(objective: Objective, cfg: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return objective.summed_loss(cfg, params, batch)


def held_out_evaluator(
    cfg: ModelConfig, frozen: Any, initial: Any, examples: Sequence[Any], objective: Objective, seq: int
) -> Evaluator:
    """Returns the evaluator on held-out examples (mean nats of a completion's token) or pairs (mean preference loss).

    `initial`: the params before training, for a loss that has a reference. On a mesh its devices share the rows,
    EVALUATION_ROWS each.
    """
    rows = EVALUATION_ROWS * row_shards()
    batches: Sequence[Any]
    summed: Callable[..., Any]
    if objective is NEXT_TOKEN:
        batches, unit, key = list(evaluation_batches(examples, seq, rows)), "nats/token", "val_nats_per_token"
        summed, size = score, max(sum(int(batch.mask.sum()) for batch in batches), 1)
    else:
        batches = [
            Preferences(part.chosen, part.rejected, reference)
            for part, reference in _with_margins(cfg, initial, examples, seq, rows)
        ]
        unit, key, summed, size = "preference loss", "val_preference_loss", functools.partial(_summed, objective), len(examples)
    return Evaluator(batches, lambda trainable, batch: summed(cfg, merge(trainable, frozen), batch), size, unit, key)

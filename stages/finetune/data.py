"""Preference batches with reference margins, and the held-out evaluators of both fine-tuning objectives."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from engine.inference.score import score
from engine.model.config import ModelConfig
from engine.model.paths import merge
from engine.text.epoch_order import EpochOrder
from engine.text.examples import Pair
from engine.text.packing import evaluation_batches, evaluation_pairs, pair_batch
from engine.training.preference import Preferences, margins
from engine.training.step import NEXT_TOKEN, Objective
from stages.runs.data.conversations import EVALUATION_ROWS
from stages.runs.loop import Evaluator


class PreferenceBatches:
    """Batches of pairs, with their margins by the reference, the model before training (`initial` params)."""

    def __init__(self, cfg: ModelConfig, initial: Any, pairs: Sequence[Pair], seq: int, batch: int, seed: int) -> None:
        self.pairs, self.seq, self.order = pairs, seq, EpochOrder(len(pairs), batch, seed)
        self._reference = np.zeros(len(pairs), np.float32)
        for part in evaluation_pairs(pairs, seq, batch):
            real = part.pair >= 0
            reference = margins(cfg, initial, Preferences(part.chosen, part.rejected))
            self._reference[part.pair[real]] = process_allgather(reference, tiled=True)[real]

    def epoch(self, step: int) -> float:
        return self.order.epoch(step)

    def at(self, step: int) -> Preferences:
        part = pair_batch(self.pairs, self.order.at(step), self.seq)
        return Preferences(part.chosen, part.rejected, self._reference[part.pair])

    def once(self) -> list[Preferences]:
        """Returns the batches of one epoch, whole ones; at least one."""
        return [self.at(step) for step in range(max(1, len(self.pairs) // self.order.batch))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summed(objective: Objective, cfg: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return objective.summed_loss(cfg, params, batch)


def held_out_evaluator(
    cfg: ModelConfig, frozen: Any, initial: Any, examples: Sequence[Any], objective: Objective, seq: int, seed: int
) -> Evaluator:
    """Returns the evaluator on held-out examples (mean nats of a completion's token) or pairs (mean preference loss).

    `initial`: the params before training.
    """
    batches: Sequence[Any]
    summed: Callable[..., Any]
    if objective is NEXT_TOKEN:
        batches, unit, key = list(evaluation_batches(examples, seq, EVALUATION_ROWS)), "nats/token", "val_nats_per_token"
        summed = score
    else:
        pairs = PreferenceBatches(cfg, initial, examples, seq, min(EVALUATION_ROWS, len(examples)), seed)
        batches, unit, key = pairs.once(), "preference loss", "val_preference_loss"
        summed = functools.partial(_summed, objective)
    size = max(sum(float(objective.count(batch)) for batch in batches), 1)
    return Evaluator(batches, lambda trainable, batch: summed(cfg, merge(trainable, frozen), batch), size, unit, key)

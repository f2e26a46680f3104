"""Batches and evaluators of fine-tuning, for both objectives: answers, and preferences with their reference margins."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from engine.inference.score import score
from engine.model.config import ModelConfig
from engine.model.paths import merge
from engine.text.examples import Pair
from engine.text.order import EpochOrder
from engine.text.packing import evaluation_batches, evaluation_pairs, pair_batch
from engine.training.preference import Preferences, margins
from engine.training.step import NEXT_TOKEN, Objective
from stages.runs.conversation_data import ROWS


class PreferenceBatches:
    """Batches of pairs with the margins that the untrained model (`base` params) has for them."""

    def __init__(self, cfg: ModelConfig, base: Any, pairs: Sequence[Pair], seq: int, batch: int, seed: int) -> None:
        self.pairs, self.seq, self.order = pairs, seq, EpochOrder(len(pairs), batch, seed)
        self._reference = np.zeros(len(pairs), np.float32)
        for part in evaluation_pairs(pairs, seq, batch):
            real = part.pair >= 0
            reference = margins(cfg, base, Preferences(part.chosen, part.rejected))
            self._reference[part.pair[real]] = np.asarray(reference)[real]

    def epoch(self, step: int) -> float:
        return self.order.epoch(step)

    def at(self, step: int) -> Preferences:
        part = pair_batch(self.pairs, self.order.at(step), self.seq)
        return Preferences(part.chosen, part.rejected, self._reference[part.pair])

    def once(self) -> list[Preferences]:
        """Returns every pair, once, as far as they fill whole batches; at least one batch."""
        return [self.at(step) for step in range(max(1, len(self.pairs) // self.order.batch))]


@dataclasses.dataclass(frozen=True)
class HeldOutEvaluator:
    """Evaluates on held-out examples: mean nats of an answer's token, or the mean preference loss."""

    cfg: ModelConfig
    frozen: Any
    batches: Sequence[Any]
    objective: Objective

    @property
    def unit(self) -> str:
        return "nats/token" if self.objective is NEXT_TOKEN else "preference loss"

    @property
    def key(self) -> str:
        return "val_nats_per_token" if self.objective is NEXT_TOKEN else "val_preference_loss"

    def evaluate(self, trainable: Any, stopped: Callable[[], bool] = lambda: False) -> float | None:
        """Returns the mean over all held-out targets (or pairs); None when it was `stopped` in between."""
        cfg, params = self.cfg, merge(trainable, self.frozen)
        summed = score if self.objective is NEXT_TOKEN else functools.partial(_summed, self.objective)
        total = count = 0.0
        for batch in self.batches:
            if stopped():
                return None
            total += float(summed(cfg, params, batch))
            count += float(self.objective.count(batch))
        return total / max(count, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summed(objective: Objective, cfg: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return objective.summed(cfg, params, batch)


def held_out_evaluator(
    cfg: ModelConfig, frozen: Any, base: Any, examples: Sequence[Any], objective: Objective, seq: int, seed: int
) -> HeldOutEvaluator:
    """Returns the evaluator of the objective on these held-out examples or pairs; `base` are the untrained params."""
    if objective is NEXT_TOKEN:
        return HeldOutEvaluator(cfg, frozen, list(evaluation_batches(examples, seq, ROWS)), objective)
    pairs = PreferenceBatches(cfg, base, examples, seq, min(ROWS, len(examples)), seed)
    return HeldOutEvaluator(cfg, frozen, pairs.once(), objective)

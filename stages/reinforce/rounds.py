"""Rounds of reinforcement learning: inference samples completions, a rule rewards them, training updates the weights."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from engine.inference.decode import prepare_params
from engine.model.paths import merge
from engine.storage.digest import digest
from engine.text.epoch_order import EpochOrder
from engine.training.reinforce import Rollouts, group_advantages, log_probabilities
from engine.training.step import Objective, TrainState
from stages.reinforce.data import Prompt
from stages.reinforce.rollouts import Rollout, Sampler, rollout_batch
from stages.runs.estimate import RunPlan
from stages.runs.loop import Evaluator, LoopState
from stages.runs.trainable import TrainableSplit
from stages.runs.training_steps import compile_step


class Round(NamedTuple):
    """The result of a round. `before`, `after`: digests of the weights. `grad_norm`: of its last update."""

    rollout: Rollout
    training_seconds: float
    before: str
    after: str
    grad_norm: float
    kl: float | None


class Rounds:
    """The Steps of reinforcement learning: runs one round after another.

    A round samples `group` completions of each of `prompts_each` prompts, and takes `updates` steps on them. `kl`: the
    weight of the divergence from the untrained model, which then scores each completion too.
    """

    advice = "--learning-rate"
    evaluator: Evaluator | None = None
    buffer_bytes = 0
    lines_stay = True

    def __init__(
        self, plan: RunPlan, split: TrainableSplit, sampler: Sampler, objective: Objective, prompts: Sequence[Prompt],
        prompts_each: int, group: int, updates: int, kl: float, state: TrainState,
    ) -> None:  # fmt: skip
        self.plan, self.split, self.sampler, self.prompts = plan, split, sampler, prompts
        self.group, self.updates, self.kl = group, updates, kl
        self.order = EpochOrder(len(prompts), prompts_each, plan.seed)
        self.rounds: list[Round] = []
        rows = prompts_each * group
        batch = rollout_batch([[0]] * rows, [[0]] * rows, plan.recipe.context)
        rollouts = self._rollouts(state, batch, self._advantages([0.0] * rows))
        recipe = plan.recipe
        self.program = compile_step(plan.cfg, recipe.optimizer, recipe.accumulate, state, split.frozen, rollouts, objective)
        self.params = prepare_params(plan.cfg, merge(state.trainable, split.frozen))
        self.digest = digest(self.params)

    def run(self, state: TrainState, loop_state: LoopState) -> tuple[TrainState, list[bool]]:
        """Runs a round; makes no updates when `kl` is 0 and the completions of each prompt have equal rewards."""
        plan, before = self.plan, self.digest
        prompts = [self.prompts[index] for index in self.order.at(loop_state.step) for _ in range(self.group)]
        rollout = self.sampler.rollout(self.params, prompts, first_seed(plan.seed, loop_state.step, plan.recipe.batch))
        if digest(self.params) != before:
            raise RuntimeError("Inference changed the weights.")
        begin = time.perf_counter()
        advantages = self._advantages(rollout.rewards)
        norm, kl, refused = 0.0, None, []
        if advantages.any() or self.kl:
            batch = rollout_batch(rollout.prompts, rollout.completions, plan.recipe.context)
            rollouts = self._rollouts(state, batch, advantages)
            if self.kl:  # the divergence from the untrained model, in nats a sampled token
                log_ratio = np.where(batch.mask, rollouts.reference_logprobs - rollouts.old_logprobs, 0)
                kl = float((np.exp(log_ratio) - log_ratio - 1).sum() / max(batch.mask.sum(), 1))
            for _ in range(self.updates):
                state, metrics = self.program(state, self.split.frozen, rollouts, np.float32(0))
                norm = float(metrics.grad_norm)
                refused.append(bool(metrics.refused))
        training = time.perf_counter() - begin
        self.params = prepare_params(plan.cfg, merge(state.trainable, self.split.frozen))
        self.digest = digest(self.params)
        self.rounds.append(Round(rollout, training, before, self.digest, norm, kl))
        reward = rollout.mean_reward
        loop_state.best = reward if loop_state.best is None else max(loop_state.best, reward)
        return state, refused

    def metrics(self, loop_state: LoopState, step_seconds: float) -> dict[str, float]:
        """Returns the last round's mean reward, tokens, seconds, gradient norm and KL."""
        last = self.rounds[-1]
        return {
            "reward": last.rollout.mean_reward, "answer_tokens": last.rollout.tokens,
            "inference_seconds": last.rollout.seconds, "training_seconds": last.training_seconds,
            "grad_norm": last.grad_norm, **({} if last.kl is None else {"kl": last.kl}),
        }  # fmt: skip

    def fields(self, loop_state: LoopState, step_seconds: float) -> list[str]:
        """Returns the same in words, with the weights' digests before and after training."""
        last = self.rounds[-1]
        pull = "" if last.kl is None else f", KL {last.kl:.4f}"
        weights = f"weights {last.before[:8]}"
        changed = "all alike, nothing to train on" if last.after == last.before else f"{weights} -> {last.after[:8]}"
        return [
            f"reward {last.rollout.mean_reward:.3f}",
            f"| inference {last.rollout.seconds:.2f} s, {last.rollout.tokens:,} tokens, {weights} unchanged",
            f"| training {last.training_seconds:.2f} s, {changed}{pull} |",
        ]

    def _advantages(self, rewards: Sequence[float]) -> np.ndarray:
        return np.asarray(group_advantages(np.reshape(rewards, (-1, self.group)))).reshape(-1)

    def _rollouts(self, state: TrainState, batch: Any, advantages: np.ndarray) -> Rollouts:
        """Adds the log-probabilities that the objective needs: by the model that sampled, and by the untrained one."""
        old = reference = None
        if self.updates > 1 or self.kl:
            old = self._log_probabilities(merge(state.trainable, self.split.frozen), batch)
        if self.kl:
            # An untrained adapter changes nothing, to the bit, and the program is the one above.
            reference = self._log_probabilities(merge(self.split.trainable, self.split.frozen), batch)
        return Rollouts(batch, advantages, old, reference)

    def _log_probabilities(self, params: Any, batch: Any) -> np.ndarray:
        rows = self.plan.recipe.batch // self.plan.recipe.accumulate  # that a step reads at once
        parts = [jax.tree.map(lambda x, at=at: x[at : at + rows], batch) for at in range(0, len(batch.tokens), rows)]
        return np.concatenate([np.asarray(log_probabilities(self.plan.cfg, params, part)) for part in parts])


def first_seed(seed: int, round_number: int, rows: int) -> int:
    """Returns the seed of a round's first row of `rows`; no two rows of a run share one. -1: that of held-out prompts."""
    return (seed * 1_000_003 + (round_number + 1) * rows) % 2**32

"""Rounds of reinforcement learning: inference samples completions, a rule rewards them, training updates the weights."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.inference.decode import prepare_params
from engine.model.paths import merge
from engine.storage.digest import digest
from engine.text.epoch_order import EpochOrder
from engine.training.reinforce import Rollouts, group_advantages
from engine.training.step import Objective, TrainState
from stages.reinforce.data import Prompt
from stages.reinforce.rollouts import Rollout, Sampler, rollout_batch, score_completions
from stages.runs.estimate import RunPlan
from stages.runs.loop import Evaluator
from stages.runs.loop_state import LoopState
from stages.runs.trainable import TrainableSplit
from stages.runs.training_steps import compile_step

ALIKE_ROUNDS = 8  # in a row in which the completions of no prompt differ in reward end a run


class Round(NamedTuple):
    """The result of a round. `before`, `after`: digests of the weights. `grad_norm`: of its last update.

    `differs`: whether completions of a prompt differed in reward, without which there is no update. `base_bits`: bits per
    byte of the completions under the model before training. `kl`: nats a token from it, None where KL has no weight.
    """

    rollout: Rollout
    training_seconds: float
    before: str
    after: str
    differs: bool
    base_bits: float
    grad_norm: float
    kl: float | None


class Rounds:
    """The Steps of reinforcement learning: runs one round after another.

    A round samples `group` completions of each of `prompts_each` prompts, has the model before training score them, and
    takes `updates` steps on them. `kl`: the weight of the divergence from that model. `fluency`: the weight of a second reward,
    the negative bits per byte by that model. `alike`: rounds just before, in a row, in which no prompt's completions differed.
    """

    advice = "--learning-rate"
    evaluator: Evaluator | None = None
    buffer_bytes = 0
    lines_stay = True

    def __init__(
        self, plan: RunPlan, split: TrainableSplit, sampler: Sampler, objective: Objective, prompts: Sequence[Prompt],
        prompts_each: int, group: int, updates: int, kl: float, fluency: float, alike: int, state: TrainState,
    ) -> None:  # fmt: skip
        self.plan, self.split, self.sampler, self.prompts = plan, split, sampler, prompts
        self.group, self.updates, self.kl, self.fluency = group, updates, kl, fluency
        self.order = EpochOrder(len(prompts), prompts_each, plan.seed)
        self.alike, self.exhausted = alike, alike >= ALIKE_ROUNDS
        recipe, rows = plan.recipe, prompts_each * group
        self.rows = rows // recipe.accumulate  # that a step reads at once
        batch = rollout_batch([[0]] * rows, [[0]] * rows, recipe.context)
        empty = np.zeros(batch.tokens.shape, np.float32)
        rollouts = Rollouts(batch, np.zeros(rows, np.float32), empty if updates > 1 else None, empty)
        self.program = compile_step(plan.cfg, recipe.optimizer, recipe.accumulate, state, split.frozen, rollouts, objective)
        self.params = prepare_params(plan.cfg, merge(state.trainable, split.frozen))
        self.digest = digest(self.params)

    def run(self, state: TrainState, loop_state: LoopState) -> tuple[TrainState, list[bool]]:
        """Runs a round; makes no updates when the completions of each prompt have equal rewards.

        `exhausted` after ALIKE_ROUNDS such rounds in a row.
        """
        plan, before, seq = self.plan, self.digest, self.plan.recipe.context
        prompts = [self.prompts[index] for _, index in self.order.at(loop_state.step) for _ in range(self.group)]
        rollout = self.sampler.rollout(self.params, prompts, first_seed(plan.seed, loop_state.step, plan.recipe.batch))
        if digest(self.params) != before:
            raise RuntimeError("Inference changed the weights.")
        begin = time.perf_counter()
        # An untrained adapter changes nothing, to the bit, and the program is that of a trained one.
        base = merge(self.split.trainable, self.split.frozen)
        scores = score_completions(plan.cfg, base, rollout, seq, self.rows)
        rewards, norm, kl = np.reshape(rollout.rewards, (-1, self.group)), 0.0, None
        differs = bool((rewards != rewards[:, :1]).any())
        refused: list[bool] = []
        if differs:
            old = None
            if self.updates > 1:
                params = merge(state.trainable, self.split.frozen)
                old = score_completions(plan.cfg, params, rollout, seq, self.rows).logprobs
            advantages = group_advantages(rewards, -self.fluency * scores.bits_each.reshape(rewards.shape))
            rollouts = Rollouts(scores.batch, np.asarray(advantages).reshape(-1), old, scores.logprobs)
            progress = np.float32(plan.progress(loop_state.step, loop_state.seconds))
            for _ in range(self.updates):
                state, metrics = self.program(state, self.split.frozen, rollouts, progress)
                if self.kl and not refused:  # at first new equals old, and the advantages add up to 0
                    kl = float(metrics.loss) / self.kl
                norm = float(metrics.grad_norm)
                refused.append(bool(metrics.refused))
            self.params = prepare_params(plan.cfg, merge(state.trainable, self.split.frozen))
            self.digest = digest(self.params)
        training = time.perf_counter() - begin
        self.last = Round(rollout, training, before, self.digest, differs, scores.bits, norm, kl)
        self.alike = 0 if differs else self.alike + 1
        self.exhausted = self.alike >= ALIKE_ROUNDS
        reward = rollout.mean_reward
        ends_refused = refused[-1] if refused else loop_state.refused_in_a_row  # then it is not saved
        if not ends_refused and (loop_state.best is None or reward > loop_state.best):
            loop_state.best = reward  # of the weights before this round's updates, which no checkpoint holds: no `best_step`
        return state, refused

    def metrics(self, loop_state: LoopState, step_seconds: float) -> dict[str, float]:
        """Returns the last round's mean reward, base_bits, tokens, seconds, gradient norm, and KL."""
        last = self.last
        return {
            "reward": last.rollout.mean_reward, "base_bits_per_byte": last.base_bits, "answer_tokens": last.rollout.tokens,
            "inference_seconds": last.rollout.seconds, "training_seconds": last.training_seconds,
            "grad_norm": last.grad_norm, "differs": last.differs, **({} if last.kl is None else {"kl": last.kl}),
        }  # fmt: skip

    def fields(self, loop_state: LoopState, step_seconds: float) -> list[str]:
        """Returns the same in words, with the weights' digests before and after training."""
        last = self.last
        pull = "" if last.kl is None else f", KL {last.kl:.4f}"
        weights = f"weights {last.before[:8]}"
        changed = f"{weights} -> {last.after[:8]}" if last.differs else "all alike, nothing to train on"
        return [
            f"reward {last.rollout.mean_reward:.3f}",
            f"base {last.base_bits:.2f} bits/byte",
            f"| inference {last.rollout.seconds:.2f} s, {last.rollout.tokens:,} tokens, {weights} unchanged",
            f"| training {last.training_seconds:.2f} s, {changed}{pull} |",
        ]


def first_seed(seed: int, round_number: int, rows: int) -> int:
    """Returns the seed of a round's first row of `rows`; no two rows of a run share one. Below 0: held-out prompts."""
    return (seed * 1_000_003 + (round_number + 1) * rows) % 2**32

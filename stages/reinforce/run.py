"""Reinforcement learning: inference samples completions, a rule rewards them, training updates weights."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.stages import Compiled

from engine.allocator import make_room
from engine.device import Device
from engine.errors import UserError
from engine.format import duration
from engine.inference.decode import prepare_params
from engine.inference.engine import complete
from engine.inference.request import Completion, SamplingParams
from engine.model.paths import merge
from engine.model.transformer import Params
from engine.storage.digest import digest
from engine.storage.model_loader import model_name
from engine.text.batch import EpochOrder
from engine.text.packing import example_rows
from engine.training.reinforce import PolicyBatch, group_advantages
from engine.training.step import TrainState
from stages.cli.console import Console, ReportProgress
from stages.reinforce.flags import ReinforceFlags
from stages.reinforce.plan import ReinforcePlan, plan_reinforcement, reinforce_rows
from stages.reinforce.rollouts import Prompt, Rollout, prompt_tokens, rollout_batch, score_batch
from stages.runs.answers import compare
from stages.runs.batch_steps import temporary_bytes
from stages.runs.folder import clear_run, default_folder
from stages.runs.model_stage import PreparedModel, Rows
from stages.runs.options import RunOptions
from stages.runs.run import execute
from stages.runs.stage import Finished, LoopState, RunReport, StepResult
from stages.runs.step_program import compile_step
from stages.runs.text_evaluators import Evaluator

EVALUATED = 32  # held-out completions sampled before and after training, at least
SHOWN_PROMPTS = 3
TOLERATED_BITS = 0.3  # a byte that completions may be worse under the model before training
ALIKE_ROUNDS = 8  # in a row in which the completions of no prompt differ in reward end a run
# Of a round and, in a checkpoint, of all rounds.
TOTALS = ("inference_seconds", "training_seconds", "answer_tokens")


def run(flags: ReinforceFlags, device: Device) -> int:
    first_task = _task_name(flags.rollout.task[0])
    folder = flags.folder.out_dir or default_folder(model_name(flags.model), first_task)
    options = RunOptions(
        **dataclasses.asdict(flags.folder),
        stage="reinforce",
        device=device,
        folder=folder,
        dry_run=flags.dry_run,
    )
    return execute(options, functools.partial(plan_reinforcement, flags, options), prepare_reinforcement)


def _task_name(task: str) -> str:
    """Returns the name of a --task: `length` of 0.2*length:12, `my_rewards` of my_rewards.py:score."""
    _, _, without_weight = task.rpartition("*")
    name, _, _ = without_weight.partition(":")
    return Path(name).stem


def prepare_reinforcement(planned: ReinforcePlan, console: Console) -> "PreparedReinforcement":
    return PreparedReinforcement.load(planned, console, advice="--learning-rate")


class Sampled(NamedTuple):
    """Completions of held-out prompts, and their bits per byte under the model before training."""

    rollout: Rollout
    bits: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedReinforcement(PreparedModel[ReinforcePlan]):
    """What a reinforcement learning begins with."""

    def rows(self, console: Console) -> Rows:
        return reinforce_rows(self.planned, self.count_trained_numbers())

    def prompt(self) -> tuple[str, list[int]]:
        prompt = self.planned.prompts.held_out[0]
        return prompt.text, prompt_tokens(self.opened.chat, prompt)

    def begin_steps(
        self, state: TrainState, loop_state: LoopState, compiling: Any, console: Console
    ) -> "Rounds":
        with console.task("compiling training", always=True):
            program = compile_step(self.plan, state, self.frozen, self._empty_batch(), self.objective)
        return Rounds(self, program, state.trainable)

    def _empty_batch(self) -> PolicyBatch:
        """Returns a batch of a round's shapes, to compile for."""
        recipe = self.plan.recipe
        batch = example_rows([None] * recipe.batch, recipe.context)
        logprobs = np.zeros(batch.tokens.shape, np.float32)
        old_logprobs = None
        if self.planned.round.updates > 1:
            old_logprobs = logprobs
        return PolicyBatch(
            batch=batch,
            advantage=np.zeros(recipe.batch, np.float32),
            old_logprobs=old_logprobs,
            reference_logprobs=logprobs,
        )

    def measure(self, trainable: Any, console: Console) -> Sampled:
        """Samples at least EVALUATED completions of held-out prompts, in whole rounds, always with
        the same seeds."""
        plan = self.plan
        rows = plan.recipe.batch
        rounds = -(-EVALUATED // rows)
        prompts = [*itertools.islice(itertools.cycle(self.planned.prompts.held_out), rounds * rows)]
        seed = first_seed(plan.seed, -rounds, rows)
        with console.task("evaluating on held-out prompts", always=True) as report_progress:
            params = prepare_params(plan.cfg, merge(trainable, self.frozen))
            rollout = self.sample(params, prompts, seed, report_progress)
            bits = rollout.bits_per_byte(self.logprobs(self.trainable, rollout))
        return Sampled(rollout, bits.of_all)

    def sample(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        seed: int,
        report_progress: ReportProgress = lambda *_: None,
    ) -> Rollout:
        """Samples and rewards a completion of each prompt, a round's at once, with seeds seed, seed
        + 1, ...

        Raises UserError as `complete` and Rewards.
        """
        chat = self.opened.chat
        prompts_as_tokens = [prompt_tokens(chat, prompt) for prompt in prompts]
        begin = time.perf_counter()
        completions = self._complete(params, prompts_as_tokens, seed, report_progress)
        seconds = time.perf_counter() - begin
        texts = [chat.tokenizer.decode(completion.tokens).strip() for completion in completions]
        questions = [prompt.text for prompt in prompts]
        answers = [prompt.answer for prompt in prompts]
        rewards = self.planned.rewards(questions, texts, answers)
        trained_tokens = [_with_stop_token(completion) for completion in completions]
        return Rollout(
            batch=rollout_batch(prompts_as_tokens, trained_tokens, self.plan.recipe.context),
            texts=texts,
            text_bytes=[chat.tokenizer.count_bytes(tokens) for tokens in trained_tokens],
            rewards=rewards,
            seconds=seconds,
        )

    def _complete(
        self, params: Params, prompts: Sequence[list[int]], seed: int, report_progress: ReportProgress
    ) -> list[Completion]:
        config = self.planned.round
        sampling = SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=seed,
            stop_token_ids=self.stop_token_ids,
        )
        sampling_of_each = sampling.per_row(len(prompts))
        rows = self.plan.recipe.batch
        completions: list[Completion] = []
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            completions += complete(
                self.plan.cfg, params, prompts[part], sampling_of_each[part], config.capacity
            )
            report_progress(start + rows, len(prompts))
        return completions

    def logprobs(self, trainable: Any, rollout: Rollout) -> np.ndarray:
        """Returns the log-probabilities (B, T) of completions. With the untrained adapter, which
        changes nothing to the bit, they are those of the model before training, by the program of a
        trained one."""
        rows = self.plan.recipe.batch // self.plan.recipe.accumulate
        return score_batch(self.plan.cfg, merge(trainable, self.frozen), rollout.batch, rows)

    def report(self, finished: Finished, console: Console) -> RunReport:
        """Raises UserError, and saves nothing, when the rounds taught nothing."""
        before: Sampled = finished.before
        after = self.measure(finished.state.trainable, console)
        alike = own_state(finished.loop_state)["alike"]
        is_untrained = len(alike) == finished.loop_state.step
        has_risen = after.rollout.mean_reward > before.rollout.mean_reward
        if is_untrained or (len(alike) >= ALIKE_ROUNDS and not has_risen):
            if is_untrained:
                clear_run(self.opened.folder)
            raise UserError(_nothing_to_learn(alike))
        self.opened.chat.close()
        self.check_frozen()
        path = self.checkpoint(finished.loop_state.step)
        return reinforce_report(self.planned, finished.loop_state, before, after, path)


def _with_stop_token(completion: Completion) -> list[int]:
    if completion.stop_token is None:
        return completion.tokens
    return [*completion.tokens, completion.stop_token]


class Round(NamedTuple):
    """The report of a round: a line of metrics.jsonl, and the fields of the live line."""

    metrics: dict[str, Any]
    line: list[str]


class Updated(NamedTuple):
    """What the updates on a round's completions came to."""

    state: TrainState
    batch: PolicyBatch | None  # that they were made on; None where there were none
    refused: list[bool]  # of each update
    grad_norm: float  # of the last one
    kl: float | None  # mean divergence from the model before training, before the first update


class Rounds:
    """The steps of a reinforcement learning. A round samples completions of a few prompts, has the
    model before training score them, and takes optimizer steps on them.

    `LoopState.stage_state` holds the sums of TOTALS, and in `alike` the mean rewards of the newest rounds
    in a row in which no prompt's completions differed in reward.
    """

    evaluator: Evaluator | None = None
    lines_stay = True

    def __init__(self, prepared: PreparedReinforcement, program: Compiled, trainable: Any) -> None:
        self.prepared = prepared
        self.plan = prepared.plan
        self.config = prepared.planned.round
        self.program = program
        self.buffer_bytes = temporary_bytes(program)
        train = prepared.planned.prompts.train
        self.order = EpochOrder(count=len(train), batch=self.config.prompts, seed=self.plan.seed)
        self.params: Any = None  # the weights that sample
        self.digest = ""
        self._prepare_inference(trainable)

    def _prepare_inference(self, trainable: Any) -> None:
        self.params = None  # first: two copies would be held
        self.params = prepare_params(self.plan.cfg, merge(trainable, self.prepared.frozen))
        self.digest = digest(self.params)

    def is_exhausted(self, loop_state: LoopState) -> bool:
        return len(own_state(loop_state)["alike"]) >= ALIKE_ROUNDS

    def step(self, state: TrainState, loop_state: LoopState) -> StepResult:
        """Runs a round; makes no updates when the completions of each prompt have equal rewards."""
        digest_before = self.digest
        rollout = self._sample_round(loop_state.step)
        if digest(self.params) != digest_before:
            raise RuntimeError("Inference changed the weights.")
        begin = time.perf_counter()
        reference = self.prepared.logprobs(self.prepared.trainable, rollout)
        bits = rollout.bits_per_byte(reference)
        progress = np.float32(self.plan.progress(loop_state.step, loop_state.seconds))
        updated = self._train(state, rollout, reference, bits.of_each, progress)
        training_seconds = time.perf_counter() - begin
        metrics = round_metrics(rollout, bits.of_all, updated, training_seconds)
        return StepResult(
            state=updated.state,
            refused=updated.refused,
            metrics=Round(metrics, self._describe(metrics, digest_before)),
            trained_batch=updated.batch,
            stage_state=next_own_state(loop_state, metrics),
            reward=rollout.mean_reward,
        )

    def _sample_round(self, number: int) -> Rollout:
        train = self.prepared.planned.prompts.train
        prompts = []
        for _, index in self.order.at(number):
            prompts += [train[index]] * self.config.group
        return self.prepared.sample(self.params, prompts, first_seed(self.plan.seed, number, len(prompts)))

    def _train(
        self,
        state: TrainState,
        rollout: Rollout,
        reference: np.ndarray,
        bits: np.ndarray,
        progress: np.float32,
    ) -> Updated:
        """Updates the weights, and then those that sample.

        `reference`: log-probabilities (B, T) under the model before training; `bits`: bits per byte
        (B,) under it.
        """
        rewards = np.reshape(rollout.rewards, (-1, self.config.group))
        differs = (rewards != rewards[:, :1]).any()
        if not differs:
            return Updated(state, batch=None, refused=[], grad_norm=0.0, kl=None)
        batch = self._policy_batch(state, rollout, rewards, bits, reference)
        updated = self._update(state, batch, progress)
        self._prepare_inference(updated.state.trainable)
        return updated

    def _policy_batch(
        self,
        state: TrainState,
        rollout: Rollout,
        rewards: np.ndarray,
        bits: np.ndarray,
        reference: np.ndarray,
    ) -> PolicyBatch:
        fluency = -self.config.fluency * bits.reshape(rewards.shape)
        advantages = np.asarray(group_advantages(rewards, fluency)).reshape(-1)
        old = None
        if self.config.updates > 1:
            old = self.prepared.logprobs(state.trainable, rollout)
        return PolicyBatch(rollout.batch, advantages, old_logprobs=old, reference_logprobs=reference)

    def _update(self, state: TrainState, batch: PolicyBatch, progress: np.float32) -> Updated:
        refused = []
        grad_norm = 0.0
        kl = None
        for number in range(self.config.updates):
            make_room(self.buffer_bytes)
            state, metrics = self.program(state, self.prepared.frozen, batch, progress)
            # at first new equals old, and the advantages add up to 0
            if self.config.kl and number == 0:
                kl = float(metrics.loss) / self.config.kl
            grad_norm = float(metrics.grad_norm)
            refused.append(bool(metrics.refused))
        return Updated(state, batch, refused, grad_norm, kl)

    def _describe(self, metrics: dict[str, Any], digest_before: str) -> list[str]:
        before = digest_before[:8]
        changed = "all alike, nothing to train on"
        if metrics["differs"]:
            changed = f"weights {before} -> {self.digest[:8]}"
        if "kl" in metrics:
            changed += f", KL {metrics['kl']:.4f}"
        return [
            f"reward {metrics['reward']:.3f}",
            f"base {metrics['base_bits_per_byte']:.2f} bits/byte",
            f"| inference {metrics['inference_seconds']:.2f} s, {metrics['answer_tokens']:,} tokens, "
            f"weights {before} unchanged",
            f"| training {metrics['training_seconds']:.2f} s, {changed} |",
        ]

    def log_fields(self, metrics: list[Round], loop_state: LoopState, step_seconds: float) -> dict[str, Any]:
        return metrics[-1].metrics

    def live_fields(self, metrics: Round, loop_state: LoopState, step_seconds: float) -> list[str]:
        return metrics.line


def own_state(loop_state: LoopState) -> dict[str, Any]:
    """Returns LoopState.stage_state, of a new run too: `alike` and the TOTALS of all its rounds."""
    return dict.fromkeys(TOTALS, 0) | {"alike": []} | loop_state.stage_state


def round_metrics(rollout: Rollout, bits: float, updated: Updated, training_seconds: float) -> dict[str, Any]:
    """Returns a line of metrics.jsonl. `bits`: per byte of all completions, under the model before
    training."""
    metrics = {
        "reward": rollout.mean_reward,
        "base_bits_per_byte": bits,
        "answer_tokens": rollout.tokens,
        "inference_seconds": rollout.seconds,
        "training_seconds": training_seconds,
        "grad_norm": updated.grad_norm,
        "differs": updated.batch is not None,
    }
    if updated.kl is not None:
        metrics["kl"] = updated.kl
    return metrics


def next_own_state(loop_state: LoopState, metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns LoopState.stage_state after a round of these metrics."""
    before = own_state(loop_state)
    totals = {name: before[name] + metrics[name] for name in TOTALS}
    alike: list[float] = []
    if not metrics["differs"]:
        alike = [*before["alike"], metrics["reward"]]
    return {**totals, "alike": alike}


def first_seed(seed: int, round_number: int, rows: int) -> int:
    """Returns the seed of a round's first row of `rows`; no two rows of a run share one. Below 0:
    held-out prompts."""
    return (seed * 1_000_003 + (round_number + 1) * rows) % 2**32


# The report


def reinforce_report(
    planned: ReinforcePlan, loop_state: LoopState, before: Sampled, after: Sampled, path: Path
) -> RunReport:
    start = before.rollout
    end = after.rollout
    own = own_state(loop_state)
    totals = {name: own[name] for name in TOTALS}
    result = {
        "held_out_reward_before": start.mean_reward,
        "held_out_reward_after": end.mean_reward,
        "base_bits_per_byte_before": before.bits,
        "base_bits_per_byte_after": after.bits,
        "best_round": loop_state.best,
        "seconds": loop_state.seconds,
        **totals,
    }
    reward = f"{start.mean_reward:.3f} -> {end.mean_reward:.3f} on held-out prompts"
    if end.mean_reward <= start.mean_reward:
        reward += "; it did not rise: give more --rounds, a larger --group, or easier prompts"
    bits = f"{before.bits:.2f} -> {after.bits:.2f} bits per byte under the model before training"
    if after.bits > before.bits + TOLERATED_BITS:
        bits += f"; worse by more than {TOLERATED_BITS:g}: give a higher --kl or --fluency"
    inference = duration(totals["inference_seconds"])
    training = duration(totals["training_seconds"])
    ended = ""
    if len(own["alike"]) >= ALIKE_ROUNDS:
        ended = f"early: {ALIKE_ROUNDS} rounds in a row without a difference in reward"
    rows = [
        ("reward", reward),
        ("answers", bits),
        ("time", f"{inference} of inference, {training} of training"),
        ("ended", ended),
    ]
    shown = [prompt.text for prompt in planned.prompts.held_out[:SHOWN_PROMPTS]]
    texts = compare(shown, _with_rewards(start), _with_rewards(end))
    return RunReport(result, texts, rows, str(path), ["chat", "serve", "export"])


def _with_rewards(rollout: Rollout) -> list[tuple[str, str]]:
    return [(text, f"reward {reward:.2f}") for text, reward in zip(rollout.texts, rollout.rewards)]


def _nothing_to_learn(rewards: list[float]) -> str:
    """Returns the sentence for a run that ended in rounds of these mean rewards, the same for all
    answers to a prompt."""
    reward = sum(rewards) / len(rewards)
    advice = "Give prompts that fit the task with --data, a task that rewards in part, such as length:12, or a larger --group"
    if reward > 0.9:
        advice = "The model does this already: give a harder --task, or harder prompts with --data"
    return (
        f"In {len(rewards)} rounds in a row all answers to a prompt had the same reward "
        f"({reward:.2f} on average), so that nothing could be learned and the run has no result. {advice}."
    )

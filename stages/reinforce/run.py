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

from engine.device import Device, make_room
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
from engine.text.examples import example_rows
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
from stages.runs.stage import Finished, LoopState, RunReport, StepResult, compile_step
from stages.runs.text_data import Evaluator

EVALUATED = 32  # held-out completions sampled before and after training, at least
SHOWN_PROMPTS = 3
TOLERATED_BITS = 0.3  # a byte that completions may be worse under the model before training
ALIKE_ROUNDS = 8  # in a row in which the completions of no prompt differ in reward end a run
# Of a round and, in a checkpoint, of all rounds.
TOTALS = ("inference_seconds", "training_seconds", "answer_tokens")


def run(flags: ReinforceFlags, device: Device) -> int:
    task = Path(flags.rollout.task[0].rpartition("*")[2].partition(":")[0]).stem
    folder = flags.folder.out_dir or default_folder(model_name(flags.model), task)
    options = RunOptions(
        **dataclasses.asdict(flags.folder),
        stage="reinforce",
        device=device,
        folder=folder,
        dry_run=flags.dry_run,
    )
    return execute(options, functools.partial(plan_reinforcement, flags, options), prepare_reinforcement)


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
        plan = self.plan
        batch = example_rows([None] * plan.recipe.batch, plan.recipe.context)
        empty = np.zeros(batch.tokens.shape, np.float32)
        advantage = np.zeros(plan.recipe.batch, np.float32)
        like = PolicyBatch(batch, advantage, empty if self.planned.round.updates > 1 else None, empty)
        with console.task("compiling training", always=True):
            program = compile_step(plan, state, self.frozen, like, self.objective)
        return Rounds(self, program, state.trainable)

    def measure(self, trainable: Any, console: Console) -> Sampled:
        """Samples at least EVALUATED completions of held-out prompts, in whole rounds, always with
        the same seeds."""
        plan = self.plan
        rows = plan.recipe.batch
        parts = -(-EVALUATED // rows)
        prompts = [*itertools.islice(itertools.cycle(self.planned.prompts.held_out), parts * rows)]
        with console.task("evaluating on held-out prompts", always=True) as report:
            params = prepare_params(plan.cfg, merge(trainable, self.frozen))
            rollout = self.sample(params, prompts, first_seed(plan.seed, -parts, rows), report)
            _, bits = rollout.bits(self.logprobs(self.trainable, rollout))
        return Sampled(rollout, bits)

    def sample(
        self, params: Params, prompts: Sequence[Prompt], seed: int, report: ReportProgress = lambda *_: None
    ) -> Rollout:
        """Samples and rewards a completion of each prompt, a round's at once, with seeds seed, seed
        + 1, ...

        Raises UserError as `complete` and Rewards.
        """
        config = self.planned.round
        chat = self.opened.chat
        tokens = [prompt_tokens(chat, prompt) for prompt in prompts]
        sampling = SamplingParams(
            config.max_tokens, config.temperature, seed=seed, stop_token_ids=self.stop_token_ids
        )
        each = sampling.per_row(len(prompts))
        rows = self.plan.recipe.batch
        ends: list[Completion] = []
        begin = time.perf_counter()
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            ends += complete(self.plan.cfg, params, tokens[part], each[part], config.capacity)
            report(start + rows, len(prompts))
        seconds = time.perf_counter() - begin
        texts = [chat.tokenizer.decode(end.tokens).strip() for end in ends]
        completions = []
        for end in ends:
            stop = [] if end.stop_token is None else [end.stop_token]
            completions.append([*end.tokens, *stop])
        questions = [prompt.text for prompt in prompts]
        answers = [prompt.answer for prompt in prompts]
        rewards = self.planned.rewards(questions, texts, answers)
        batch = rollout_batch(tokens, completions, self.plan.recipe.context)
        sizes = [chat.tokenizer.count_bytes(completion) for completion in completions]
        return Rollout(batch, texts, sizes, rewards, seconds)

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


class Round(NamedTuple):
    """What a round is told of by: a line of metrics.jsonl, and the fields of the live line."""

    metrics: dict[str, Any]
    line: list[str]


class Updated(NamedTuple):
    """What the updates on a round's completions came to."""

    state: TrainState
    refused: list[bool]  # of each update
    grad_norm: float  # of the last one
    kl: float | None  # mean divergence from the model before training, before the first update


class Rounds:
    """The steps of a reinforcement learning. A round samples completions of a few prompts, has the
    model before training score them, and takes optimizer steps on them.

    `LoopState.stage` holds the sums of TOTALS, and in `alike` the mean rewards of the newest rounds
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
        self.order = EpochOrder(len(prepared.planned.prompts.train), self.config.prompts, prepared.plan.seed)
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
        bits_each, bits = rollout.bits(reference)
        rewards = np.reshape(rollout.rewards, (-1, self.config.group))
        differs = bool((rewards != rewards[:, :1]).any())
        batch = None
        updated = Updated(state, [], 0.0, None)
        if differs:
            batch = self._policy_batch(state, rollout, rewards, bits_each, reference)
            updated = self._update(
                state, batch, np.float32(self.plan.progress(loop_state.step, loop_state.seconds))
            )
            self._prepare_inference(updated.state.trainable)
        training_seconds = time.perf_counter() - begin
        reward = rollout.mean_reward
        metrics = {
            "reward": reward,
            "base_bits_per_byte": bits,
            "answer_tokens": rollout.tokens,
            "inference_seconds": rollout.seconds,
            "training_seconds": training_seconds,
            "grad_norm": updated.grad_norm,
            "differs": differs,
        }
        if updated.kl is not None:
            metrics["kl"] = updated.kl
        before = own_state(loop_state)
        totals = {name: before[name] + metrics[name] for name in TOTALS}
        alike: list[float] = []
        if not differs:
            alike = [*before["alike"], reward]
        told = Round(metrics, self._describe(metrics, digest_before))
        return StepResult(updated.state, updated.refused, told, batch, totals | {"alike": alike}, reward)

    def _sample_round(self, number: int) -> Rollout:
        train = self.prepared.planned.prompts.train
        prompts = []
        for _, index in self.order.at(number):
            prompts += [train[index]] * self.config.group
        return self.prepared.sample(self.params, prompts, first_seed(self.plan.seed, number, len(prompts)))

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
        return PolicyBatch(rollout.batch, advantages, old, reference)

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
        return Updated(state, refused, grad_norm, kl)

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
    """Returns LoopState.stage, of a new run too: `alike` and the TOTALS of all its rounds."""
    return dict.fromkeys(TOTALS, 0) | {"alike": []} | loop_state.stage


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

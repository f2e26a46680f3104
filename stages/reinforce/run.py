"""Reinforcement learning: inference samples completions, a rule rewards them, training updates the weights."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.counting.flops import forward_flops, prefill_flops
from engine.counting.memory import inference_memory
from engine.device import Device, make_room
from engine.errors import UserError
from engine.format import duration, format_count, quantity
from engine.inference.decode import prepare_params
from engine.inference.engine import complete
from engine.inference.request import Completion, SamplingParams
from engine.model.paths import merge
from engine.model.transformer import Params
from engine.storage.digest import digest
from engine.storage.model_loader import model_name
from engine.text.batch import EpochOrder
from engine.text.examples import example_rows
from engine.training.optimizer import OptimizerConfig
from engine.training.reinforce import PolicyBatch, group_advantages, grpo
from engine.training.step import TrainState
from stages.cli.console import Console, ReportProgress
from stages.reinforce.flags import ReinforceFlags
from stages.reinforce.rollouts import Prompt, Rollout, prompt_tokens, prompts_for, rollout_batch, score_batch
from stages.runs.answers import compare
from stages.runs.estimate import memory_estimate, require_room
from stages.runs.folder import clear_run, default_folder
from stages.runs.model_stage import ModelStage, choose_trainable
from stages.runs.plan import Recipe, RunPlan
from stages.runs.rewards import Rewards
from stages.runs.run import RunOptions, execute
from stages.runs.stage import LoopState, RunReport, compile_step, temporary_bytes

SECONDS, LEAST_ROUNDS = 120.0, 20  # of a run when nobody asks for a length
TOKENS = 48  # of a completion, where the context has room for them
MULTIPLE = 32  # tokens that a row's length is rounded up to
EVALUATED = 32  # held-out completions sampled before and after training, at least
SHOWN_PROMPTS = 3
MICROBATCH_TOKENS = 1024  # more hold more logits and are no faster
TOLERATED_BITS = 0.3  # a byte that completions may be worse under the model before training
ALIKE_ROUNDS = 8  # in a row in which the completions of no prompt differ in reward end a run
TOTALS = ("inference_seconds", "training_seconds", "answer_tokens")  # of a round and, in a checkpoint, of all rounds


def run(flags: ReinforceFlags, device: Device) -> int:
    task = Path(flags.rollout.task[0].rpartition("*")[2].partition(":")[0]).stem
    folder = flags.folder.out_dir or default_folder(model_name(flags.model), task)
    options = RunOptions(
        **dataclasses.asdict(flags.folder), stage="reinforce", device=device, folder=folder, dry_run=flags.dry_run
    )
    return execute(options, lambda console: ReinforcementLearning(flags, options, console))


class ReinforcementLearning(ModelStage):
    """Trains a model on its own completions. Only the constructor reads the flags.

    A step is a round: it samples completions of a few prompts, has the model before training score them, and takes `updates`
    optimizer steps on them. `kl`: the weight of the divergence from that model. `fluency`: the weight of a second reward, the
    negative bits per byte by that model. `LoopState.stage` holds the sums of TOTALS, and in `alike` the mean rewards of the
    newest rounds in a row in which no prompt's completions differed in reward.
    """

    advice, lines_stay = "--learning-rate", True

    def __init__(self, flags: ReinforceFlags, options: RunOptions, console: Console) -> None:
        rollout, update, trainable, length = flags.rollout, flags.update, flags.trainable, flags.length
        self.group, self.prompts_each = rollout.group, rollout.prompts
        self.updates, self.clip, self.kl, self.fluency = update.updates, update.clip, update.kl, update.fluency
        self.rewards = Rewards(rollout.task, rollout.reward_timeout, "mend it, or give a longer --reward-timeout")
        self.prompts = prompts_for(self.rewards.names, rollout.data, flags.seed)
        super().__init__(flags.model, trainable, options.folder, console)
        cfg = self.model.cfg
        self.longest = max(len(prompt_tokens(self.chat, prompt)) for prompt in (*self.prompts.train, *self.prompts.held_out))
        room = cfg.context - self.longest
        if room < (rollout.max_tokens or 1):
            raise UserError(
                f"The longest prompt has {self.longest:,} tokens, which leaves {max(0, room):,} of the model's context of "
                f"{cfg.context:,} for an answer; give {'a lower --max-tokens or ' if room > 0 else ''}shorter prompts."
            )
        self.max_tokens, rows = rollout.max_tokens or min(TOKENS, room), rollout.prompts * rollout.group
        self.temperature, self.capacity = rollout.temperature, self.longest + self.max_tokens
        self.objective = grpo(self.clip, self.kl)
        # The rate falls in the second half, without which the reward falls again: a round's gradient is mostly noise.
        optimizer = OptimizerConfig(
            learning_rate=update.learning_rate or (5e-4 if self.lora else 2e-5),
            schedule="wsd",
            warmup=0,
            decay=0.5,
            beta2=0.99,
            weight_decay=0,
        )
        seq = -(-(self.capacity - 1) // MULTIPLE) * MULTIPLE
        microbatches = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n * seq <= max(MICROBATCH_TOKENS, seq))
        paths, self.matches = choose_trainable(cfg, self.lora, trainable.train, trainable.freeze)
        seconds = length.max_time or (None if length.rounds else SECONDS)
        recipe = Recipe("the model's", seq, rows, optimizer, microbatches)
        least_rounds = 0 if length.max_time or length.rounds else LEAST_ROUNDS
        run = flags.seed, length.rounds, seconds, paths, trainable.base
        self.plan = RunPlan(self.model.name, cfg, recipe, *run, "round", least_rounds, blocks=self.blocks)
        self.metadata = {
            "learns": trainable.describe(self.lora),
            "text": {
                "data": f"{self.rewards.name} on {self.prompts.name}",
                "digest": f"{self.rewards.name} {self.prompts.digest}",
            },
            "rollout": dataclasses.asdict(rollout) | {"data": str(rollout.data or "")},
            "update": dataclasses.asdict(update),
        }
        # A step, beside the weights that sample and their cache.
        inference = inference_memory(cfg, rows, self.capacity)
        self.memory = self.plan.memory.total + inference.params + inference.cache
        remedy = "give fewer --prompts, a smaller --group, fewer --max-tokens, or a smaller model."
        require_room(self.plan, self.memory, "A round would need about", remedy)

    def plan_rows(self) -> list[tuple[str, str]]:
        plan, updates, prompts = self.plan, self.updates, self.prompts
        inference, training = self._flops()
        steps = f"{quantity(updates, 'step')} on them: up to {format_count(training)}FLOPs"
        return [
            *self.model_rows(),
            *self.matches,
            ("task", f"{self.rewards.name} ({self.rewards.describe()})"),
            ("prompts", f"{len(prompts.train):,} of {prompts.name}; {len(prompts.held_out):,} held out"),
            ("template", self.chat.template_name),
            (
                "a round",
                f"{self.prompts_each} prompts, {self.group} completions each, of at most {self.max_tokens} tokens, "
                f"at temperature {self.temperature:g}",
            ),
            ("inference", f"samples them: up to {format_count(inference)}FLOPs, forward only"),
            (
                "training",
                f"{steps}; clip {self.clip:g}, KL {self.kl:g}, fluency {self.fluency:g}, "
                f"adamw {plan.recipe.optimizer.learning_rate:g}",
            ),
            ("memory", memory_estimate(plan, self.memory)),
            ("length", plan.length()),
        ]

    def _flops(self) -> tuple[int, int]:
        """Returns the most FLOPs of inference and of training in a round: those of the longest completions."""
        plan, cfg, new = self.plan, self.plan.cfg, self.max_tokens
        prefill = prefill_flops(cfg, self.longest, attention="causal").total
        decode = (new - 1) * forward_flops(cfg, self.longest + new // 2, attention="full").total
        passes = (self.updates > 1) + 1  # that give log-probabilities
        scoring = passes * plan.step_tokens * forward_flops(cfg, plan.recipe.context, attention="full").total
        return plan.recipe.batch * (prefill + decode), self.updates * plan.step_flops + scoring

    def prompt(self) -> tuple[str, list[int]]:
        prompt = self.prompts.held_out[0]
        return prompt.text, prompt_tokens(self.chat, prompt)

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> None:
        plan, rows = self.plan, self.plan.recipe.batch
        self.order = EpochOrder(len(self.prompts.train), self.prompts_each, plan.seed)
        loop_state.stage = dict.fromkeys(TOTALS, 0) | {"alike": []} | loop_state.stage
        self.exhausted = len(loop_state.stage["alike"]) >= ALIKE_ROUNDS
        batch = example_rows([None] * rows, plan.recipe.context)
        empty = np.zeros(batch.tokens.shape, np.float32)
        rollouts = PolicyBatch(batch, np.zeros(rows, np.float32), empty if self.updates > 1 else None, empty)
        with self.console.task("compiling training", always=True):
            self.program = compile_step(plan, state, self.frozen, rollouts, self.objective)
        self.buffer_bytes = temporary_bytes(self.program)
        self._prepare_inference(state.trainable)

    def _prepare_inference(self, trainable: Any) -> None:
        self.params: Any = None  # first: two copies would be held
        self.params = prepare_params(self.plan.cfg, merge(trainable, self.frozen))
        self.digest = digest(self.params)

    def step(self, state: TrainState, loop_state: LoopState) -> tuple[TrainState, list[bool]]:
        """Runs a round; makes no updates when the completions of each prompt have equal rewards.

        `exhausted` after ALIKE_ROUNDS such rounds in a row.
        """
        plan, before, number, refused = self.plan, self.digest, loop_state.step, list[bool]()
        prompts = [self.prompts.train[index] for _, index in self.order.at(number) for _ in range(self.group)]
        rollout = self.rollout(self.params, prompts, first_seed(plan.seed, number, len(prompts)))
        if digest(self.params) != before:
            raise RuntimeError("Inference changed the weights.")
        begin, reward = time.perf_counter(), rollout.mean_reward
        reference = self._logprobs(self.trainable, rollout)
        bits_each, bits = rollout.bits(reference)
        rewards, norm, kl = np.reshape(rollout.rewards, (-1, self.group)), 0.0, {}
        differs, self.trained_batch = bool((rewards != rewards[:, :1]).any()), None
        if differs:
            old = self._logprobs(state.trainable, rollout) if self.updates > 1 else None
            advantages = group_advantages(rewards, -self.fluency * bits_each.reshape(rewards.shape))
            rollouts = PolicyBatch(rollout.batch, np.asarray(advantages).reshape(-1), old, reference)
            self.trained_batch = rollouts
            progress = np.float32(plan.progress(number, loop_state.seconds))
            for _ in range(self.updates):
                make_room(self.buffer_bytes)
                state, metrics = self.program(state, self.frozen, rollouts, progress)
                # At first new equals old, and the advantages add up to 0.
                if self.kl and not refused:
                    kl = {"kl": float(metrics.loss) / self.kl}
                norm = float(metrics.grad_norm)
                refused.append(bool(metrics.refused))
            self._prepare_inference(state.trainable)
        training = time.perf_counter() - begin
        self.last = {
            "reward": reward,
            "base_bits_per_byte": bits,
            "answer_tokens": rollout.tokens,
            "inference_seconds": rollout.seconds,
            "training_seconds": training,
            "grad_norm": norm,
            "differs": differs,
            **kl,
        }
        changed = f"weights {before[:8]} -> {self.digest[:8]}" if differs else "all alike, nothing to train on"
        self.line = [
            f"reward {reward:.3f}",
            f"base {bits:.2f} bits/byte",
            f"| inference {rollout.seconds:.2f} s, {rollout.tokens:,} tokens, weights {before[:8]} unchanged",
            f"| training {training:.2f} s, {changed}" + (f", KL {kl['kl']:.4f} |" if kl else " |"),
        ]
        alike = [] if differs else [*loop_state.stage["alike"], reward]
        self.exhausted = len(alike) >= ALIKE_ROUNDS
        loop_state.stage = {name: loop_state.stage[name] + self.last[name] for name in TOTALS} | {"alike": alike}
        ends_refused = refused[-1] if refused else loop_state.refused_in_a_row  # then it is not saved
        if not ends_refused and (loop_state.best is None or reward > loop_state.best):
            loop_state.best = reward  # of the weights before this round's updates, which no checkpoint holds: no `best_step`
        return state, refused

    def metrics(self, loop_state: LoopState, step_seconds: float) -> dict[str, float]:
        return self.last

    def fields(self, loop_state: LoopState, step_seconds: float) -> list[str]:
        return self.line

    def finish(
        self, state: TrainState, loop_state: LoopState, warm_rate: float | None, before: tuple[Rollout, float]
    ) -> RunReport:
        """Raises UserError, and saves nothing, when the rounds taught nothing."""
        (start, bits_before), (after, bits_after) = before, self.measure(state.trainable)
        alike = loop_state.stage.get("alike", [])
        exhausted, untrained = len(alike) >= ALIKE_ROUNDS, len(alike) == loop_state.step
        if untrained or (exhausted and after.mean_reward <= start.mean_reward):
            if untrained:
                clear_run(self.folder)
            raise UserError(_nothing_to_learn(alike))
        path = self.save_trained(loop_state.step, state.trainable)
        totals = {name: loop_state.stage.get(name, 0) for name in TOTALS}
        result = {
            "held_out_reward_before": start.mean_reward,
            "held_out_reward_after": after.mean_reward,
            "base_bits_per_byte_before": bits_before,
            "base_bits_per_byte_after": bits_after,
            "best_round": loop_state.best,
            "seconds": loop_state.seconds,
            **totals,
        }
        noted = ([(text, f"reward {reward:.2f}") for text, reward in zip(each.texts, each.rewards)] for each in (start, after))
        texts = compare([prompt.text for prompt in self.prompts.held_out[:SHOWN_PROMPTS]], *noted)
        reward = f"{start.mean_reward:.3f} -> {after.mean_reward:.3f} on held-out prompts"
        if after.mean_reward <= start.mean_reward:
            reward += "; it did not rise: give more --rounds, a larger --group, or easier prompts"
        bits = f"{bits_before:.2f} -> {bits_after:.2f} bits per byte under the model before training"
        if bits_after > bits_before + TOLERATED_BITS:
            bits += f"; worse by more than {TOLERATED_BITS:g}: give a higher --kl or --fluency"
        inference, training = duration(totals["inference_seconds"]), duration(totals["training_seconds"])
        rows = [
            ("reward", reward),
            ("answers", bits),
            ("time", f"{inference} of inference, {training} of training"),
            ("ended", f"early: {ALIKE_ROUNDS} rounds in a row without a difference in reward" * exhausted),
        ]
        return RunReport(result, texts, rows, str(path), ["chat", "serve", "export"])

    def measure(self, trainable: Any) -> tuple[Rollout, float]:
        """Samples at least EVALUATED completions of held-out prompts, in whole rounds, always with the same seeds.

        Returns them, and their bits per byte under the model before training.
        """
        plan, rows = self.plan, self.plan.recipe.batch
        parts = -(-EVALUATED // rows)
        prompts = [*itertools.islice(itertools.cycle(self.prompts.held_out), parts * rows)]
        with self.console.task("evaluating on held-out prompts", always=True) as report:
            params = prepare_params(plan.cfg, merge(trainable, self.frozen))
            rollout = self.rollout(params, prompts, first_seed(plan.seed, -parts, rows), report)
            return rollout, rollout.bits(self._logprobs(self.trainable, rollout))[1]

    def rollout(
        self, params: Params, prompts: Sequence[Prompt], seed: int, report: ReportProgress = lambda *_: None
    ) -> Rollout:
        """Samples and rewards a completion of each prompt, a round's at once, with seeds seed, seed + 1, ...

        Raises UserError as `complete` and Rewards.
        """
        tokens = [prompt_tokens(self.chat, prompt) for prompt in prompts]
        sampling = SamplingParams(self.max_tokens, self.temperature, seed=seed, stop_token_ids=self.stop_token_ids)
        each, ends, rows = sampling.per_row(len(prompts)), list[Completion](), self.plan.recipe.batch
        begin = time.perf_counter()
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            ends += complete(self.plan.cfg, params, tokens[part], each[part], self.capacity)
            report(start + rows, len(prompts))
        seconds, tokenizer = time.perf_counter() - begin, self.chat.tokenizer
        texts = [tokenizer.decode(end.tokens).strip() for end in ends]
        completions = [end.tokens if end.stop_token is None else [*end.tokens, end.stop_token] for end in ends]
        rewards = self.rewards([prompt.text for prompt in prompts], texts, [prompt.answer for prompt in prompts])
        batch = rollout_batch(tokens, completions, self.plan.recipe.context)
        return Rollout(batch, texts, [*map(tokenizer.count_bytes, completions)], rewards, seconds)

    def _logprobs(self, trainable: Any, rollout: Rollout) -> np.ndarray:
        """Returns the log-probabilities (B, T) of completions. With the untrained adapter, which changes nothing to the bit,
        they are those of the model before training, by the program of a trained one."""
        plan, params = self.plan, merge(trainable, self.frozen)
        return score_batch(plan.cfg, params, rollout.batch, plan.recipe.batch // plan.recipe.accumulate)


def first_seed(seed: int, round_number: int, rows: int) -> int:
    """Returns the seed of a round's first row of `rows`; no two rows of a run share one. Below 0: held-out prompts."""
    return (seed * 1_000_003 + (round_number + 1) * rows) % 2**32


def _nothing_to_learn(rewards: list[float]) -> str:
    """Returns the sentence for a run that ended in rounds of these mean rewards, the same for all answers to a prompt."""
    reward = sum(rewards) / len(rewards)
    advice = "Give prompts that fit the task with --data, a task that rewards in part, such as length:12, or a larger --group"
    if reward > 0.9:
        advice = "The model does this already: give a harder --task, or harder prompts with --data"
    return (
        f"In {len(rewards)} rounds in a row all answers to a prompt had the same reward ({reward:.2f} on average), so that "
        f"nothing could be learned and no adapter was saved. {advice}."
    )

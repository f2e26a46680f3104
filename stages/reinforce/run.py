"""The Stage that trains by reinforcement learning, and its run from flags."""

import dataclasses
import functools
import itertools
import json
import operator
from collections.abc import Sequence
from typing import Any

from engine.counting.flops import decode_flops, forward_flops, prefill_flops
from engine.counting.memory import inference_memory
from engine.device import Device
from engine.errors import UserError
from engine.format import duration, format_count
from engine.inference.decode import prepare_params
from engine.model.paths import merge
from engine.storage.digest import digest
from engine.storage.model_loader import model_name
from engine.training.optimizer import OptimizerConfig
from engine.training.reinforce import grpo
from engine.training.rewards import TASKS, make_reward
from engine.training.step import TrainState
from stages.cli.console import Console
from stages.reinforce.data import prompts_for
from stages.reinforce.flags import ReinforceFlags
from stages.reinforce.rollouts import Rollout, Sampler, prompt_tokens, score_completions
from stages.reinforce.rounds import ALIKE_ROUNDS, Rounds, first_seed
from stages.runs.answers import before_and_after
from stages.runs.estimate import Recipe, RunPlan, memory_estimate
from stages.runs.folder import clear_run, default_folder
from stages.runs.loop import Loop, RunOptions
from stages.runs.loop_state import LoopState
from stages.runs.model_stage import ModelStage
from stages.runs.run import execute
from stages.runs.summary import RunReport
from stages.runs.trainable import choose_trainable

SECONDS, LEAST_ROUNDS = 120.0, 20  # of a run when nobody asks for a length
TOKENS = 48  # of a completion, where the context has room for them
MULTIPLE = 32  # tokens that a row's length is rounded up to
EVALUATED = 32  # held-out completions sampled before and after training, at least
SHOWN_PROMPTS = 3
MICROBATCH_TOKENS = 1024  # more hold more logits and are no faster
TOLERATED_BITS = 0.3  # a byte that completions may be worse under the model before training


def run(flags: ReinforceFlags, device: Device) -> int:
    """Trains, or resumes; returns 0, or 128 + the signal that stopped it."""
    task = flags.rollout.task.partition(":")[0]
    intervals = dataclasses.asdict(flags.folder)
    folder = intervals.pop("out_dir") or default_folder(model_name(flags.model), task)
    options = RunOptions("reinforce", device, folder, flags.dry_run, **intervals)
    return execute(options, lambda console: ReinforcementLearning(flags, options, console))


class ReinforcementLearning(ModelStage):
    """Trains a model on its own completions. Only the constructor reads the flags."""

    def __init__(self, flags: ReinforceFlags, options: RunOptions, console: Console) -> None:
        rollout, update, trainable, length = flags.rollout, flags.update, flags.trainable, flags.length
        lora = trainable.adapter
        self.task, self.group, self.prompts_each = rollout.task, rollout.group, rollout.prompts
        self.updates, self.clip, self.kl, self.fluency = update.updates, update.clip, update.kl, update.fluency
        self.prompts = prompts_for(rollout.task, rollout.data, flags.seed)
        reward = make_reward(rollout.task)
        super().__init__(flags.model, lora, options.folder, console)
        cfg = self.model.cfg
        self.longest = max(len(prompt_tokens(self.chat, prompt)) for prompt in (*self.prompts.train, *self.prompts.held_out))
        room = cfg.context - self.longest
        if room < (rollout.max_tokens or 1):
            raise UserError(
                f"The longest prompt has {self.longest:,} tokens, which leaves {max(0, room):,} of the model's context of "
                f"{cfg.context:,} for an answer; give {'a lower --max-tokens or ' if room > 0 else ''}shorter prompts."
            )
        max_tokens = rollout.max_tokens or min(TOKENS, room)
        capacity = self.longest + max_tokens
        self.sampler = Sampler(
            cfg, self.chat, frozenset(self.stop_token_ids), reward, rollout.temperature, max_tokens, capacity
        )
        # The rate falls in the second half, without which the reward falls again: a round's gradient is mostly noise.
        optimizer = OptimizerConfig(
            kind="adamw", learning_rate=update.learning_rate or (5e-4 if lora else 2e-5), schedule="wsd", warmup=0,
            decay=0.5, beta2=0.99, weight_decay=0,
        )  # fmt: skip
        rows, seq = rollout.prompts * rollout.group, -(-(capacity - 1) // MULTIPLE) * MULTIPLE
        microbatches = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n * seq <= max(MICROBATCH_TOKENS, seq))
        paths, self.matches = choose_trainable(cfg, lora, trainable.train, trainable.freeze)
        seconds = length.max_time or (None if length.rounds else SECONDS)
        recipe = Recipe("the model's", seq, rows, optimizer, microbatches)
        least_rounds = 0 if length.max_time or length.rounds else LEAST_ROUNDS
        self.plan = RunPlan(
            self.model.name, cfg, recipe, flags.seed, length.rounds, seconds, paths, trainable.base, "round", least_rounds
        )
        task = rollout.task
        self.facts = {
            "learns": trainable.describe(),
            "text": {"data": f"{task} on {self.prompts.name}", "digest": f"{task} {self.prompts.digest}"},
            "rollout": dataclasses.asdict(rollout) | {"data": str(rollout.data or "")},
            "update": dataclasses.asdict(update),
        }
        # A step, beside the weights that sample and their cache.
        inference = inference_memory(cfg, rows, capacity)
        self.memory = self.plan.memory.total + inference.params + inference.cache
        self.plan.require(
            self.memory, "A round would need about",
            "give fewer --prompts, a smaller --group, fewer --max-tokens, or a smaller model.",
        )  # fmt: skip

    def plan_rows(self) -> list[tuple[str, str]]:
        plan, updates, prompts = self.plan, self.updates, self.prompts
        inference, training = self._flops()
        rate = plan.recipe.optimizer.learning_rate
        return [
            self.model_row(),
            *self.matches,
            ("task", f"{self.task} ({TASKS[self.task.partition(':')[0]].partition(', ')[2]})"),
            ("prompts", f"{len(prompts.train):,} of {prompts.name}; {len(prompts.held_out):,} held out"),
            ("template", self.chat.template_name),
            ("a round", f"{self.prompts_each} prompts, {self.group} completions each, of at most {self.sampler.max_tokens} "
                        f"tokens, at temperature {self.sampler.temperature:g}"),
            ("inference", f"samples them: up to {format_count(inference)}FLOPs, forward only"),
            ("training", f"{updates} step{'s' * (updates > 1)} on them: up to {format_count(training)}FLOPs; "
                         f"clip {self.clip:g}, KL {self.kl:g}, fluency {self.fluency:g}, adamw {rate:g}"),
            ("memory", memory_estimate(self.plan, self.memory)),
            ("length", plan.length()),
        ]  # fmt: skip

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> Rounds:
        with self.console.task("compiling training", always=True):
            return Rounds(
                self.plan, self.split, self.sampler, grpo(self.clip, self.kl), self.prompts.train, self.prompts_each,
                self.group, self.updates, self.kl, self.fluency, _alike(self._logged()), state,
            )  # fmt: skip

    def finish(self, state: TrainState, loop: Loop, start: tuple[Rollout, float]) -> RunReport:
        """Measures again, saves an adapter if one was trained, and returns the RunReport, which `execute` prints.

        Raises UserError, and saves nothing, when the rounds taught nothing.
        """
        (before, bits_before), (after, bits_after), loop_state = start, self.measure(state.trainable), loop.loop_state
        rounds = self._logged()
        exhausted = _alike(rounds) >= ALIKE_ROUNDS
        untrained = not loop_state.refused and digest(state.trainable) == digest(self.split.trainable)
        if untrained or (exhausted and after.mean_reward <= before.mean_reward):
            if untrained:
                clear_run(self.folder)
            raise UserError(_nothing_to_learn([line["reward"] for line in rounds[-ALIKE_ROUNDS:]]))
        path = self.save_trained(loop_state.step, state.trainable)
        inference, training, tokens = (
            sum(line[name] for line in rounds) for name in ("inference_seconds", "training_seconds", "answer_tokens")
        )
        result = {
            "held_out_reward_before": before.mean_reward, "held_out_reward_after": after.mean_reward,
            "base_bits_per_byte_before": bits_before, "base_bits_per_byte_after": bits_after,
            "best_round": loop_state.best, "seconds": loop_state.seconds, "inference_seconds": inference,
            "training_seconds": training, "answer_tokens": tokens,
        }  # fmt: skip
        answers = [
            [(text, f"reward {reward:.2f}") for text, reward in zip(each.texts, each.rewards)] for each in (before, after)
        ]
        texts = [
            (prompt.text, before_and_after(*pair)) for prompt, *pair in zip(self.prompts.held_out[:SHOWN_PROMPTS], *answers)
        ]
        unlearned, worse = after.mean_reward <= before.mean_reward, bits_after > bits_before + TOLERATED_BITS
        rows = [
            ("reward", f"{before.mean_reward:.3f} -> {after.mean_reward:.3f} on held-out prompts"
                       + "; it did not rise: give more --rounds, a larger --group, or easier prompts" * unlearned),
            ("answers", f"{bits_before:.2f} -> {bits_after:.2f} bits per byte under the model before training"
                        + f"; worse by more than {TOLERATED_BITS:g}: give a higher --kl or --fluency" * worse),
            ("time", f"{duration(inference)} of inference, {duration(training)} of training"),
            *([("ended", f"early: {ALIKE_ROUNDS} rounds in a row without a difference in reward")] if exhausted else []),
        ]  # fmt: skip
        return RunReport(result, texts, rows, str(path), ["chat", "export"])

    def _logged(self) -> list[dict[str, Any]]:
        """Returns the metrics of all rounds, of those before an interruption too."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_bytes().splitlines())
        return [line for line in lines if "reward" in line]  # others name a refused batch

    def measure(self, trainable: Any) -> tuple[Rollout, float]:
        """Samples at least EVALUATED completions of held-out prompts, in whole rounds, always with the same seeds.

        Returns them, and their bits per byte under the model before training.
        """
        plan, rows, frozen = self.plan, self.plan.recipe.batch, self.split.frozen
        prompts = itertools.cycle(self.prompts.held_out)
        with self.console.task("evaluating on held-out prompts", always=True) as report:
            params, rollouts, count = prepare_params(plan.cfg, merge(trainable, frozen)), [], -(-EVALUATED // rows)
            for part in range(count):
                seed = first_seed(plan.seed, -1 - part, rows)
                rollouts.append(self.sampler.rollout(params, [*itertools.islice(prompts, rows)], seed))
                report(part + 1, count)
            rollout = Rollout(*(functools.reduce(operator.add, field) for field in zip(*rollouts)))
            base, microbatch = merge(self.split.trainable, frozen), rows // plan.recipe.accumulate
            return rollout, score_completions(plan.cfg, base, rollout, plan.recipe.context, microbatch).bits

    def _flops(self) -> tuple[int, int]:
        """Returns the most FLOPs of inference and of training in a round: those of the longest completions."""
        plan, cfg, new = self.plan, self.plan.cfg, self.sampler.max_tokens
        prefill = prefill_flops(cfg, self.longest, attention="causal").total
        decode = (new - 1) * decode_flops(cfg, self.longest + new // 2).total
        passes = (self.updates > 1) + 1  # that give log-probabilities
        scoring = passes * plan.step_tokens * forward_flops(cfg, plan.recipe.context, attention="full").total
        return plan.recipe.batch * (prefill + decode), self.updates * plan.step_flops + scoring


def _alike(rounds: Sequence[dict[str, Any]]) -> int:
    """Returns how many rounds at the end had no difference in reward."""
    return sum(1 for _ in itertools.takewhile(lambda line: not line.get("differs", True), reversed(rounds)))


def _nothing_to_learn(rewards: Sequence[float]) -> str:
    """Returns the sentence for a run that ended in rounds of these mean rewards, the same for all answers to a prompt."""
    reward = sum(rewards) / len(rewards)
    advice = "Give prompts that fit the task with --data, a task that rewards in part, such as length:12, or a larger --group"
    if reward > 0.9:
        advice = "The model does this already: give a harder --task, or harder prompts with --data"
    return (
        f"In {len(rewards)} rounds in a row all answers to a prompt had the same reward ({reward:.2f} on average), so that "
        f"nothing could be learned and no adapter was saved. {advice}."
    )

"""A fine-tuning run: from flags to plain values, and the stage that fine-tunes with them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.allocator import return_freed_memory
from engine.counting.hardware import peak_rss_bytes
from engine.device import Device
from engine.errors import UserError
from engine.format import duration, size
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from engine.model.config import ModelConfig
from engine.model.paths import merge
from engine.text.packing import PackedBatches
from engine.text.template import read_template
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.preference import dpo
from engine.training.step import NARROW, NEXT_TOKEN, TrainState, train_step
from stages.cli.console import Console
from stages.finetune.data import PreferenceBatches, held_out_evaluator
from stages.finetune.flags import Finetune
from stages.finetune.memory import check_memory, cost_relative_to_full
from stages.runs.conversation_data import prepare_conversations
from stages.runs.estimate import RunPlan, ceiling, measured_ceilings, memory_limit
from stages.runs.folder import default_folder
from stages.runs.loop import Intervals, Loop, LoopState
from stages.runs.model_stage import ModelStage
from stages.runs.recipes import Recipe
from stages.runs.run import RunOptions, RunReport, execute, next_commands
from stages.runs.text_data import check_text_name
from stages.runs.trainable import choose_trainable
from stages.runs.training_steps import TrainingSteps
from stages.runs.validation import general_bits_per_byte

SECONDS = 180.0  # of a run when nobody asks for a length
EXPECTED = 0.4  # of the ceiling
QUICK = 64  # held-out examples of a quick evaluation
SAMPLE = 90  # tokens
QUESTION = "What should I do when I cannot sleep?"
ADVICE = "--learning-rate, or warm up longer with --warmup"


def run(flags: Finetune, device: Device) -> int:
    """Fine-tunes as the flags say. Returns the exit code."""
    length = flags.length
    seconds = length.max_time or (None if length.steps else SECONDS)
    folder = flags.folder.out_dir or default_folder(Path(flags.model).stem or "model", Path(flags.examples.data).stem)
    fifth = seconds / 5 if seconds else max(1, (length.steps or 5) // 5)
    intervals = Intervals(flags.folder.save_every, flags.folder.keep, evaluate=flags.tuning.eval_every or fifth)
    options = RunOptions("finetune", device, folder, flags.folder.overwrite, flags.dry_run, intervals)
    return execute(options, lambda console: FineTuning(flags, seconds, options, console))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How a model does on the held-out set and general text (bits per byte, None without one); its answer to QUESTION."""

    held_out: float
    general: float | None
    answer: str


class FineTuning(ModelStage):
    """Fine-tuning: a Stage. The constructor is the last to read the flags."""

    noun = "step"

    def __init__(self, flags: Finetune, seconds: float | None, options: RunOptions, console: Console) -> None:
        examples, tuning, trainable = flags.examples, flags.tuning, flags.trainable
        lora, self.device = trainable.adapter, options.device
        self.general, self.pack, self.batch = examples.general, examples.pack, tuning.batch
        is_preference = tuning.objective == "preference"
        self.objective = dpo(tuning.beta) if is_preference else NEXT_TOKEN
        rate = (2e-3 if lora else 2e-5) / (10 if is_preference else 1)
        optimizer = OptimizerConfig(
            kind="adamw", learning_rate=tuning.learning_rate or rate, schedule="cosine", warmup=tuning.warmup,
            beta2=0.99, weight_decay=tuning.weight_decay, clip=tuning.clip,
        )  # fmt: skip
        rows = tuning.batch * (2 if is_preference else 1)  # of tokens
        recipe = Recipe("the model's", tuning.context, rows, optimizer, flags.microbatches, tuning.scan, tuning.remat)

        def make_plan(cfg: ModelConfig) -> None:
            """From the architecture alone. Raises UserError, before a weight is read, for what cannot be done."""
            if tuning.context > cfg.context:
                raise UserError(
                    f"--context {tuning.context:,} is more than the {cfg.context:,} tokens {flags.model} was made for."
                )
            cfg = dataclasses.replace(cfg, scan=tuning.scan, remat="block" if tuning.remat else "none")
            paths, self.matches = choose_trainable(cfg, lora, trainable.train, trainable.freeze)
            self.plan = RunPlan(flags.model, cfg, recipe, flags.seed, flags.length.steps, seconds, paths, trainable.base)
            check_memory(self.plan, tuning.batch, is_lora=lora is not None)

        if examples.general != "none":
            check_text_name(examples.general)
        super().__init__(flags.model, lora, options.folder, console, read_template(examples.template), make_plan)
        self.plan = dataclasses.replace(self.plan, name=self.model.name)
        self.dataset = prepare_conversations(
            examples.data, examples.validation, tuning.objective, tuning.context, self.model, self.chat, console
        )
        self.facts = {
            "learns": trainable.describe(),
            "objective": tuning.objective,
            "text": {"data": examples.data, "validation": examples.validation, "digest": self.dataset.digest},
        }
        self.top = ceiling(self.plan.cfg, measured_ceilings(console))

    def print_plan(self) -> None:
        """Prints the banner, and the first example with what is trained on marked."""
        plan, dataset, console = self.plan, self.dataset, self.console
        steps, long = plan.predict(plan.step_flops / (EXPECTED * self.top))
        limit = f"{plan.steps:,} steps" if plan.steps else f"{duration(plan.seconds or 0)} of training time"
        optimizer = plan.recipe.optimizer
        console.print_rows([
            ("device", str(self.device)),
            self.model_row(),
            *self.matches,
            ("predicted", cost_relative_to_full(plan)),
            ("memory", f"about {size(plan.memory)} of {size(memory_limit())} that are left for a step"),
            ("data", f"{dataset.name} ({dataset.kind}): {dataset.summary.describe()[0]}"),
            *(("", line) for line in dataset.summary.describe()[1:]),
            ("validation", f"{dataset.held_out_name}: {len(dataset.held_out):,} examples"),
            ("template", self.chat.template_name),
            ("step", f"{plan.recipe.batch} x {plan.recipe.context} tokens, adamw, {optimizer.learning_rate:g}"),
            ("length", f"{limit}; about {steps:,} steps, {long}"),
            ("folder", str(self.folder)),
        ])  # fmt: skip
        console.print()
        console.print("the first example; what is trained on is marked", style="bold")
        console.print_marked(list(self.chat.marked_pieces(dataset.first)))
        console.print()

    def measure_before(self) -> None:
        self.before = self._measure(self.parts.trainable)

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> TrainingSteps:
        plan, frozen = self.plan, self.parts.frozen
        # Programs that measured are read from the cache when they are wanted again; until then their memory is the step's.
        _clear_programs()
        batches = self._batches()
        with self.console.task("compiling", always=True):
            compiled = train_step.lower(
                plan.cfg, make_optimizer(plan.recipe.optimizer), state, frozen, batches.at(0), np.float32(0),
                microbatches=plan.recipe.accumulate, objective=self.objective,
            ).compile(NARROW if plan.base == "int8" else None)  # fmt: skip
        _clear_programs()
        analysis = compiled.memory_analysis()
        return TrainingSteps(
            lambda state, batch, progress: compiled(state, frozen, batch, progress), batches, self._evaluator(QUICK), plan,
            loop_state.step, self.top, ADVICE, buffer=analysis.temp_size_in_bytes if analysis else 0,
        )  # fmt: skip

    def report(self, state: TrainState, loop: Loop) -> RunReport:
        after, plan, loop_state = self._measure(state.trainable), self.plan, loop.loop_state
        place = self.save_trained(loop_state.step, state.trainable)
        before, seconds = self.before, loop_state.seconds
        rate, speed = (loop_state.step * amount / max(seconds, 1e-9) for amount in (1, plan.step_tokens))
        share_of_ceiling = (loop.timer.warm_rate() or rate) * plan.step_flops / self.top
        numbers = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
        unit, peak = self._evaluator(1).unit, peak_rss_bytes()
        result = {
            "before": dataclasses.asdict(before), "after": dataclasses.asdict(after), "unit": unit, "steps": loop_state.step,
            "train_seconds": seconds, "tokens_per_second": speed, "peak_rss_bytes": peak,
            "flops_share_of_ceiling": share_of_ceiling, "refused_steps": loop_state.refused, "general": self.general,
        }  # fmt: skip
        forgotten = "not measured"
        if before.general is not None and after.general is not None:
            forgotten = f"{before.general:.3f} -> {after.general:.3f} bits per byte on {self.general}"
        refused = f", {loop_state.refused} refused" if loop_state.refused else ""
        rows = [
            ("held out", f"{before.held_out:.3f} -> {after.held_out:.3f} {unit} on {self.dataset.held_out_name}"),
            ("forgotten", forgotten),
            ("trained", f"{loop_state.step:,} steps, {duration(seconds)}{refused}"),
            ("speed", f"{speed:,.0f} tokens/s, {share_of_ceiling:.0%} of the ceiling"),
            ("memory", f"{size(peak)} at most"),
            ("saved", f"{place} ({numbers:,} numbers)"),
        ]
        texts = [
            (f"{title}: {QUESTION}", [f"| {line}" for line in measurement.answer.strip().split("\n")])
            for title, measurement in (("before", before), ("after", after))
        ]
        return RunReport(result, texts, rows, next_commands("chat", "evaluate", "export", model=self.folder))

    def summary(self, result: dict[str, Any]) -> str:
        before, after = (result[moment]["held_out"] for moment in ("before", "after"))
        return f"{before:.3f} -> {after:.3f} {result['unit']}"

    def _batches(self) -> PackedBatches | PreferenceBatches:
        train, plan, seq = self.dataset.train, self.plan, self.plan.recipe.context
        if self.objective is NEXT_TOKEN:
            return PackedBatches(train, seq, self.batch, plan.seed, self.pack)
        with self.console.task("asking the model what it prefers now", always=True):
            return PreferenceBatches(plan.cfg, self.parts.base(), train, seq, self.batch, plan.seed)

    def _evaluator(self, most: int | None = None) -> Any:
        plan, parts = self.plan, self.parts
        examples = self.dataset.held_out[:most]
        return held_out_evaluator(
            plan.cfg, parts.frozen, parts.base(), examples, self.objective, plan.recipe.context, plan.seed
        )

    def _measure(self, trainable: Any) -> Measurement:
        return_freed_memory()
        cfg, general = self.plan.cfg, None
        evaluator = self._evaluator()
        with self.console.task("measuring what it knows", always=True):
            held_out = evaluator.evaluate(trainable)
            params = merge(trainable, self.parts.frozen)
            if self.general != "none":
                seq = self.plan.recipe.context
                general = general_bits_per_byte(cfg, params, self.tokenizer, self.general, seq, self.console)
            _clear_programs()  # the programs that scored are as large as a small model, and are not run again soon
            prompt = self.chat.prompt([{"role": "user", "content": QUESTION}])
            sampling = SamplingParams(max_tokens=SAMPLE, temperature=0.0, stop_token_ids=self.ends)
            room = min(cfg.context, len(prompt) + SAMPLE)
            pieces = generate(cfg, for_inference(cfg, params), [prompt.tolist()], [sampling], capacity=room)
            answer = self.chat.tokenizer.decode([token for piece in pieces for token in piece.tokens])
            return Measurement(held_out, general, answer)


def _clear_programs() -> None:
    jax.clear_caches()
    return_freed_memory()

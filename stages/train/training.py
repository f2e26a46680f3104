"""Training from random weights, in JAX or by hand in NumPy: the plan, the loop's steps, and the end of the run."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

from engine.counting.flops import train_flops
from engine.counting.hardware import Ceilings, peak_rss_bytes
from engine.counting.params import count_params
from engine.device import Device
from engine.files import whole_file
from engine.format import count, duration, size
from engine.text.batches import TextBatches
from engine.training.step import TrainState
from stages.cli.command import command_line
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, ceiling, measured_ceilings
from stages.runs.folder import nonfinite_as_text
from stages.runs.loop import Loop, LoopState
from stages.runs.run import RunReport
from stages.runs.text_data import TextData
from stages.runs.trainable import TrainableParts
from stages.runs.training_steps import Program, TrainingSteps
from stages.runs.validation import bits_per_byte, quick_evaluator, rows_for, score_text

SAMPLE = 160  # tokens
LONG = 60.0  # seconds of training


class Implementation(Protocol):
    """Computes the steps of a run from random weights, and a text by the trained model."""

    optimizer_name: str  # in run.json: a run does not go on with the state of an optimizer of another name
    advice: str  # the flags to change when steps are not finite

    def nats(self, cfg: Any, params: Any, batch: Any) -> Any:
        """Returns the summed nats of a batch's targets."""

    def check_memory(self) -> None:
        """Raises UserError when there is no room for a step."""

    def estimates(self, best: Ceilings) -> tuple[str, str]:
        """Returns two rows of the banner: the memory of a step, and how long the run is predicted to take."""

    def initial_state(self) -> TrainState:
        """Returns random weights and the optimizer's state before the first step; can be traced."""

    def make_program(self, state: TrainState, batch: Any, console: Console) -> Program:
        """Returns the program of a step, for states and batches of these shapes."""

    def sample(self, params: Any, max_tokens: int) -> str:
        """Returns a text that the model writes."""

    def remarks(self, params: Any) -> list[tuple[str, str]]:
        """Returns rows of the last screen that only this implementation has."""


class Training:
    """Training from random weights: a Stage. `default_length`: nobody asked for the length of the run."""

    noun = "step"
    parts = TrainableParts()

    def __init__(
        self, implementation: Implementation, plan: RunPlan, data: TextData, facts: dict[str, Any], device: Device,
        folder: Path, default_length: bool, console: Console,
    ) -> None:  # fmt: skip
        self.implementation, self.plan, self.data, self.device = implementation, plan, data, device
        self.folder, self.default_length, self.console = folder, default_length, console
        recipe = dataclasses.asdict(plan.recipe)
        recipe["optimizer"]["kind"] = implementation.optimizer_name
        self.facts = facts | {"recipe": nonfinite_as_text(recipe)}
        self.ceilings = measured_ceilings(console)
        self.top = ceiling(plan.cfg, self.ceilings)
        self.tokenizer = data.tokenizer
        self.ends: tuple[int, ...] = (data.tokenizer.end,)
        self.batches = TextBatches(data.train.tokens, plan.recipe.context, plan.recipe.batch, plan.seed)

    def load_weights(self) -> None:
        """Checks that there is room for a step; weights begin random."""
        self.implementation.check_memory()

    def print_plan(self) -> None:
        plan, data, cfg, recipe = self.plan, self.data, self.plan.cfg, self.plan.recipe
        params, flops = count_params(cfg), train_flops(cfg, recipe.context, attention="full", remat="none").total
        memory, predicted = self.implementation.estimates(self.ceilings)
        heads = f"{cfg.heads} heads" + (f" ({cfg.kv_heads} key/value)" if cfg.kv_heads != cfg.heads else "")
        accumulated = f", {recipe.accumulate} parts at a time" if recipe.accumulate > 1 else ""
        train, validation = (f"{size(text.bytes)}, {len(text.tokens):,} tokens" for text in (data.train, data.validation))
        lengths = [f"{plan.steps:,} steps"] if plan.steps else []
        lengths += [f"{duration(plan.seconds)} of training time"] if plan.seconds else []
        length = " or ".join(lengths) + ", whichever ends first" * (len(lengths) == 2)
        default = ": the default run is time-boxed (--max-time 1h, --steps 5000 change it)" if self.default_length else ""
        rows = {
            "device": str(self.device),
            "text": f"{data.name}: {train}",
            "validation": f"{data.validation_name}: {validation}",
            "model": f"{plan.name}: {cfg.layers} layers, width {cfg.width}, {heads}, {cfg.vocab:,} tokens, {cfg.dtype}",
            "parameters": f"{params.total:,} ({params.total:,} trainable, 0 frozen)",
            "FLOPs": f"{count(flops)} a token trained (6N + 12LDT, N = {count(params.matmul)})",
            "step": f"{recipe.batch} x {recipe.context} tokens{accumulated}, {recipe.optimizer.kind}, "
            f"{recipe.optimizer.schedule}",
            "memory": memory,
            "length": f"{length}{default}",
            "predicted": predicted,
            "folder": str(self.folder),
        }
        self.console.print_rows(list(rows.items()))

    def initial_state(self) -> TrainState:
        return self.implementation.initial_state()

    def measure_before(self) -> None:
        """Measures nothing: random weights know nothing."""

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> TrainingSteps:
        program = self.implementation.make_program(state, self.batches.at(0), self.console)
        evaluator = quick_evaluator(self.plan.cfg, self.data, self.implementation.nats)
        advice = self.implementation.advice
        return TrainingSteps(program, self.batches, evaluator, self.plan, loop_state.step, self.top, advice)

    def report(self, state: TrainState, loop: Loop) -> RunReport:
        plan, cfg, data, params = self.plan, self.plan.cfg, self.data, state.trainable
        loop_state, folder = loop.loop_state, self.folder
        step, seconds = loop_state.step, loop_state.seconds
        with self.console.task("evaluating on the whole validation text", always=True) as report:
            rows, stride = rows_for(cfg, cfg.context), max(1, cfg.context // 2)
            nats = score_text(cfg, params, data.validation, cfg.context, stride, rows, report)
        with self.console.task("writing a sample"):
            text = self.implementation.sample(params, SAMPLE)
        with whole_file(folder / "samples" / f"{step}.txt") as file:
            file.write(text.encode())
        # Measuring takes seconds: a run that is hardly longer itself takes the ceilings as they are.
        top = ceiling(cfg, measured_ceilings(self.console, again=seconds >= LONG))
        peak = peak_rss_bytes()
        result = {
            "val_bits_per_byte": bits_per_byte(nats, data.validation.bytes), "train_seconds": seconds,
            "first_step_seconds": loop_state.first_step_seconds, "peak_rss_bytes": peak,
            "tokens_per_second": step * plan.step_tokens / seconds, "mfu": step * plan.step_flops / seconds / top,
            "steps": step, "refused_steps": loop_state.refused,
        }  # fmt: skip
        refused = f", {loop_state.refused} of them refused (not finite)" if loop_state.refused else ""
        screen = [
            ("validation", f"{result['val_bits_per_byte']:.4f} bits per byte on all of {data.validation_name}"),
            ("trained", f"{step:,} steps, epoch {self.batches.epoch(step):.2f}, {duration(seconds)}{refused}"),
            ("speed", f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.0%}; first step "
                      f"{duration(loop_state.first_step_seconds or 0)} after the start"),
            ("memory", f"{size(peak)} at most"),
            *self.implementation.remarks(params),
            ("files", f"{folder}: config.json, run.json, metrics.jsonl, tokenizer, checkpoints, samples"),
        ]  # fmt: skip
        prompt = ("--prompt", "ROMEO:") if data.name == "shakespeare" else ()
        commands = [command_line("generate", "--model", folder, *prompt), command_line("evaluate", "--model", folder)]
        return RunReport(result, [("what it writes", [f"| {line}" for line in text.strip("\n").split("\n")])], screen, commands)

    def summary(self, result: dict[str, Any]) -> str:
        return f"{result['val_bits_per_byte']:.3f} bits per byte"

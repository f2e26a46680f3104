"""Training from random weights in JAX, and the end of every such run: bits per byte, a sample, and what to type next."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.counting.flops import train_flops
from engine.counting.hardware import peak_rss_bytes
from engine.counting.params import count_params
from engine.device import Device
from engine.files import whole_file
from engine.format import count, duration, size
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from engine.inference.score import score
from engine.model.transformer import init_params
from engine.text.batches import TextBatches
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state, train_step
from stages.cli.command import command_line
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, ceiling, measured_ceilings, memory_limit, require_memory
from stages.runs.loop import Loop, LoopState
from stages.runs.run import RunReport
from stages.runs.text_data import TextData
from stages.runs.trainable import TrainableParts
from stages.runs.training_steps import TrainingSteps
from stages.runs.validation import TextEvaluator, bits_per_byte, rows_for, score_text

# What a step is predicted to take: its products at this share of the ceiling, the optimizer's traffic, its dispatch.
EXPECTED = 0.5
UPDATE = 28  # bytes a parameter
FIXED = 0.002  # seconds
SAMPLE = 160  # tokens
LONG = 60.0  # seconds of training
ADVICE = "--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32"


class Training:
    """Training from random weights in JAX: a Stage. `default_length`: nobody asked for the length of the run."""

    noun = "step"
    parts = TrainableParts()

    def __init__(
        self, plan: RunPlan, data: TextData, facts: dict[str, Any], device: Device, folder: Path, default_length: bool,
        console: Console,
    ) -> None:  # fmt: skip
        self.plan, self.data, self.facts, self.device, self.console = plan, data, facts, device, console
        self.folder, self.default_length = folder, default_length
        self.ceilings = measured_ceilings(console)
        self.top = ceiling(plan.cfg, self.ceilings)
        self.tokenizer = data.tokenizer
        self.ends: tuple[int, ...] = (data.tokenizer.end,)
        self.batches = TextBatches(data.train.tokens, plan.recipe.context, plan.recipe.batch, plan.seed)
        self.optimizer = make_optimizer(plan.recipe.optimizer)

    def load_weights(self) -> None:
        """Checks that there is room for weights, gradients and optimizer; weights begin random."""
        least = count_params(self.plan.cfg).total * (16 if self.plan.recipe.optimizer.kind == "adamw" else 12)
        needed = f"Training {self.plan.name} needs at least {size(least)} for weights, gradients and optimizer"
        require_memory(least, needed, "choose a smaller preset.")

    def print_plan(self) -> None:
        self.console.print_rows(list(self.banner().items()))

    def banner(self) -> dict[str, str]:
        plan, data, cfg, recipe = self.plan, self.data, self.plan.cfg, self.plan.recipe
        params, flops = count_params(cfg), train_flops(cfg, recipe.context, attention="full", remat="none").total
        update = UPDATE * params.total / (1e9 * self.ceilings.update_gbs)
        steps, long = plan.predict(plan.step_flops / (EXPECTED * self.top) + update + FIXED)
        limit = memory_limit()
        heads = f"{cfg.heads} heads" + (f" ({cfg.kv_heads} key/value)" if cfg.kv_heads != cfg.heads else "")
        accumulated = f", {recipe.accumulate} parts at a time" if recipe.accumulate > 1 else ""
        tight = "  ** more than there is: smaller --batch, --accumulate or --remat **" if plan.memory > limit else ""
        train, validation = (f"{size(text.bytes)}, {len(text.tokens):,} tokens" for text in (data.train, data.validation))
        lengths = [f"{plan.steps:,} steps"] if plan.steps else []
        lengths += [f"{duration(plan.seconds)} of training time"] if plan.seconds else []
        length = " or ".join(lengths) + ", whichever ends first" * (len(lengths) == 2)
        default = ": the default run is time-boxed (--max-time 1h, --steps 5000 change it)" if self.default_length else ""
        epochs = steps * plan.step_tokens / (len(data.train.tokens) - 1)
        return {
            "device": str(self.device),
            "text": f"{data.name}: {train}",
            "validation": f"{data.validation_name}: {validation}",
            "model": f"{plan.name}: {cfg.layers} layers, width {cfg.width}, {heads}, {cfg.vocab:,} tokens, {cfg.dtype}",
            "parameters": f"{params.total:,} ({params.total:,} trainable, 0 frozen)",
            "FLOPs": f"{count(flops)} a token trained (6N + 12LDT, N = {count(params.matmul)})",
            "step": f"{recipe.batch} x {recipe.context} tokens{accumulated}, {recipe.optimizer.kind}, "
            f"{recipe.optimizer.schedule}",
            "memory": f"about {size(plan.memory)} of {size(limit)} that are left for a step{tight}",
            "length": f"{length}{default}",
            "predicted": f"{steps:,} steps, {epochs:.2g} epochs, {long} at half of this machine's {count(self.top)}FLOP/s "
            f"in {cfg.dtype}",
            "folder": str(self.folder),
        }

    def initial_state(self) -> TrainState:
        cfg, seed = self.plan.cfg, self.plan.seed
        return jax.jit(lambda: init_state(self.optimizer, init_params(cfg, jax.random.key(seed))))()

    def measure_before(self) -> None:
        """Measures nothing: random weights know nothing."""

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> TrainingSteps:
        plan = self.plan
        with self.console.task("compiling", always=True):
            compiled = train_step.lower(
                plan.cfg, self.optimizer, state, {}, self.batches.at(0), np.float32(0), microbatches=plan.recipe.accumulate
            ).compile()
        program = lambda state, batch, progress: compiled(state, {}, batch, progress)
        return TrainingSteps(program, self.batches, self.evaluator(), plan, loop_state.step, self.top, ADVICE)

    def evaluator(self, nats_of: Any = score) -> TextEvaluator:
        """Returns the quick evaluation; `nats_of` as of `TextEvaluator`."""
        cfg = self.plan.cfg
        return TextEvaluator(cfg, self.data.validation, self.tokenizer, cfg.context, rows_for(cfg, cfg.context), nats_of)

    def sample(self, params: Any) -> str:
        """Returns a text that the model writes after a line end."""
        sampling = SamplingParams(max_tokens=SAMPLE, temperature=0.8, seed=self.plan.seed, stop_token_ids=(self.tokenizer.end,))
        prompt = self.tokenizer.encode("\n").tolist()
        pieces = generate(self.plan.cfg, for_inference(self.plan.cfg, params), [prompt], [sampling])
        return self.tokenizer.decode([token for piece in pieces for token in piece.tokens])

    def remarks(self, params: Any) -> list[tuple[str, str]]:
        return []

    def report(self, state: TrainState, loop: Loop) -> RunReport:
        plan, cfg, data, params = self.plan, self.plan.cfg, self.data, state.trainable
        loop_state, folder = loop.loop_state, self.folder
        step, seconds = loop_state.step, loop_state.seconds
        with self.console.task("evaluating on the whole validation text", always=True) as report:
            rows, stride = rows_for(cfg, cfg.context), max(1, cfg.context // 2)
            nats = score_text(cfg, params, data.validation, cfg.context, stride, rows, report)
        with self.console.task("writing a sample"):
            text = self.sample(params)
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
            *self.remarks(params),
            ("files", f"{folder}: config.json, run.json, metrics.jsonl, tokenizer, checkpoints, samples"),
        ]  # fmt: skip
        prompt = ("--prompt", "ROMEO:") if data.name == "shakespeare" else ()
        commands = [command_line("generate", "--model", folder, *prompt), command_line("evaluate", "--model", folder)]
        return RunReport(result, [("what it writes", [f"| {line}" for line in text.strip("\n").split("\n")])], screen, commands)

    def summary(self, result: dict[str, Any]) -> str:
        return f"{result['val_bits_per_byte']:.3f} bits per byte"

"""Training from random weights in JAX, and the end of every such run: bits per byte, a sample, and what to type next."""

from typing import Any

import jax
import numpy as np

from engine.counting.hardware import Ceilings, peak_rss_bytes
from engine.counting.params import count_params
from engine.files import whole_file
from engine.format import duration, size
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from engine.inference.score import score
from engine.model.transformer import init_params
from engine.text.batches import TextBatches
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state, train_step
from stages.cli.command import command_line
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, ceiling, measured_ceilings, require_memory
from stages.runs.loop import Loop, LoopState
from stages.runs.run import RunReport
from stages.runs.text_data import TextData
from stages.runs.trainable import TrainableParts
from stages.runs.training_steps import TrainingSteps
from stages.runs.validation import TextEvaluator, bits_per_byte, rows_for, score_text

SAMPLE = 160  # tokens
LONG = 60.0  # seconds of training
ADVICE = "--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32"


class Training:
    """Training from random weights in JAX: a Stage. `rows` are the banner's, `facts` run.json's."""

    noun = "step"
    parts = TrainableParts()

    def __init__(
        self, plan: RunPlan, data: TextData, ceilings: Ceilings, rows: dict[str, str], facts: dict[str, Any], console: Console
    ) -> None:
        self.plan, self.data, self.rows, self.facts, self.console = plan, data, rows, facts, console
        self.top = ceiling(plan.cfg, ceilings)
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
        self.console.print_rows(list(self.rows.items()))

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
        loop_state, folder = loop.loop_state, loop.folder
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

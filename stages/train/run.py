"""A training run: from flags to plain values, and the stage that trains them in JAX."""

import dataclasses
from typing import Any

import jax
import numpy as np

from engine.counting.hardware import Ceilings
from engine.device import Device
from engine.model.config import ModelConfig, preset
from engine.model.transformer import init_params
from engine.text.batches import TextBatches
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state, train_step
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, ceiling, measured_ceilings
from stages.runs.folder import default_folder
from stages.runs.loop import Intervals, Loop, LoopState
from stages.runs.recipes import Recipe, recipe
from stages.runs.run import RunOptions, RunReport, Stage, execute
from stages.runs.text_data import TextData, prepare_text
from stages.runs.trainable import TrainableParts
from stages.runs.training_steps import TrainingSteps
from stages.runs.validation import TextEvaluator, rows_for
from stages.train.banner import banner, check_memory, text_facts
from stages.train.by_hand import TrainingByHand
from stages.train.flags import Train
from stages.train.report import sample_text, training_report

SECONDS, SECONDS_BY_HAND = 180.0, 60.0  # of a run when nobody asks for a length
ADVICE = "--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32"


def run(flags: Train, device: Device) -> int:
    """Trains as the flags say. Returns the exit code."""
    text, length = flags.text, flags.length
    chosen = chosen_recipe(flags)
    if flags.by_hand:
        device = dataclasses.replace(device, name=f"{device.name}, by NumPy {np.__version__}")
    folder = flags.folder.out_dir or default_folder(flags.preset + "-by-hand" * flags.by_hand, text.data)
    seconds = SECONDS_BY_HAND if flags.by_hand else SECONDS
    intervals = Intervals(flags.folder.save_every, flags.folder.keep, flags.monitoring.log_every, flags.monitoring.eval_every)

    def make_stage(console: Console) -> Stage:
        data = prepare_text(text.data, text.validation, chosen.tokenizer, console)
        cfg = model_config(flags.preset, chosen, data.tokenizer.vocab, "float32" if flags.by_hand else flags.step.dtype)
        limit = length.max_time or (None if length.steps else seconds)
        plan = RunPlan(flags.preset, cfg, chosen, flags.seed, length.steps, limit)
        ceilings = measured_ceilings(console)
        rows = banner(plan, data, ceilings, device, folder, default_length=not (length.max_time or length.steps))
        facts = text_facts(plan, data, text.data, text.validation)
        stage = TrainingByHand if flags.by_hand else Training
        return stage(plan, data, ceilings, rows, facts, console)

    return execute(RunOptions("train", device, folder, flags.folder.overwrite, flags.dry_run, intervals), make_stage)


def chosen_recipe(flags: Train) -> Recipe:
    """Returns the preset's recipe with what the flags say instead."""
    base = recipe(flags.preset, preset(flags.preset).vocab)
    step, optimizer = flags.step, dataclasses.asdict(flags.optimizer)
    kind = optimizer.pop("optimizer")
    return _replace(
        base, tokenizer=flags.text.tokenizer, context=step.context, batch=step.batch,
        accumulate=1 if flags.by_hand else step.accumulate, scan=step.scan or None, remat=step.remat or None,
        optimizer=_replace(base.optimizer, kind="adamw" if flags.by_hand else kind, **optimizer),
    )  # fmt: skip


def model_config(name: str, recipe: Recipe, vocab: int, dtype: str | None) -> ModelConfig:
    """Returns the preset with this vocabulary, compute type (None: its own) and the recipe's context."""
    remat = "block" if recipe.remat else "none"
    return _replace(preset(name), vocab=vocab, context=recipe.context, dtype=dtype, scan=recipe.scan, remat=remat)


def _replace(config: Any, **values: Any) -> Any:
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})


class Training:
    """Training from random weights in JAX: a Stage."""

    noun = "step"
    parts = TrainableParts()

    def __init__(
        self, plan: RunPlan, data: TextData, ceilings: Ceilings, rows: dict[str, str], facts: dict[str, Any], console: Console
    ) -> None:
        self.plan, self.data, self.rows, self.console = plan, data, rows, console
        self.top = ceiling(plan.cfg, ceilings)
        self.tokenizer = data.tokenizer
        self.ends: tuple[int, ...] = (data.tokenizer.end,)
        self.batches = TextBatches(data.train.tokens, plan.recipe.context, plan.recipe.batch, plan.seed)
        self.optimizer = make_optimizer(plan.recipe.optimizer)
        self._facts = facts

    def facts(self) -> dict[str, Any]:
        """Returns the entries of run.json about the text."""
        return self._facts

    def load_weights(self) -> None:
        """Checks that there is room; weights begin random."""
        check_memory(self.plan)

    def print_plan(self) -> None:
        """Prints the banner."""
        self.console.print_rows(list(self.rows.items()))

    def initial_state(self) -> TrainState:
        """Returns random weights and the optimizer's first state."""
        cfg, seed = self.plan.cfg, self.plan.seed
        return jax.jit(lambda: init_state(self.optimizer, init_params(cfg, jax.random.key(seed))))()

    def measure_before(self) -> None:
        """Measures nothing: random weights know nothing."""

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> TrainingSteps:
        """Compiles the step for these shapes."""
        plan, cfg = self.plan, self.plan.cfg
        with self.console.task("compiling", always=True):
            compiled = train_step.lower(
                cfg, self.optimizer, state, {}, self.batches.at(0), np.float32(0), microbatches=plan.recipe.accumulate
            ).compile()
        evaluator = TextEvaluator(cfg, self.data.validation, self.tokenizer, cfg.context, rows_for(cfg, cfg.context))
        program = lambda state, batch, progress: compiled(state, {}, batch, progress)
        return TrainingSteps(program, self.batches, evaluator, plan, loop_state.step, self.top, ADVICE)

    def report(self, state: TrainState, loop: Loop) -> RunReport:
        """Evaluates on the whole validation text and writes a sample."""
        plan, params, epoch = self.plan, state.trainable, self.batches.epoch(loop.loop_state.step)
        sample = lambda: sample_text(plan.cfg, params, self.tokenizer, plan.seed)
        return training_report(
            plan, self.data, params, loop.loop_state, epoch, loop.config.folder, self.console, sample, remarks=[]
        )

    def summary(self, result: dict[str, Any]) -> str:
        """Returns the result in words."""
        return f"{result['val_bits_per_byte']:.3f} bits per byte"

"""`stages.train --by-hand`: the same run with another step, in NumPy, whose backward pass is written out in engine/by_hand.

Text, batches, first weights, loop and checkpoints are those of any run, so every other command can read the result. JAX
draws the first weights, gives the schedule's factor, and at the end scores the whole validation text; forward, backward
and update are NumPy's.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine import by_hand
from engine.by_hand import adamw
from engine.by_hand.generate import generate
from engine.by_hand.model import residual_count
from engine.counting.hardware import Ceilings
from engine.counting.params import count_params
from engine.errors import UserError
from engine.format import size
from engine.inference.score import score
from engine.model.transformer import init_params
from engine.text.batches import TextBatches
from engine.training.optimizer import make_schedule
from engine.training.step import Metrics, TrainState
from stages.cli.command import command_line
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, ceiling, memory_limit
from stages.runs.folder import as_json
from stages.runs.loop import Loop, LoopState
from stages.runs.run import RunReport
from stages.runs.text_data import TextData
from stages.runs.trainable import TrainableParts
from stages.runs.training_steps import TrainingSteps
from stages.runs.validation import TextEvaluator, rows_for
from stages.train.report import training_report

SAMPLE = 160  # tokens
FLOAT32 = 4  # bytes
EXPECTED = 0.15  # of the float32 ceiling, as measured with the tiny preset, whose products are small
ADVICE = "--learning-rate, or warm up longer with --warmup"


class TrainingByHand:
    """Training from random weights in NumPy: a Stage."""

    noun = "step"
    parts = TrainableParts()

    def __init__(
        self, plan: RunPlan, data: TextData, ceilings: Ceilings, rows: dict[str, str], facts: dict[str, Any], console: Console
    ) -> None:
        self.plan, self.data, self.console = plan, data, console
        self.tokenizer = data.tokenizer
        self.ends: tuple[int, ...] = (data.tokenizer.end,)
        self.batches = TextBatches(data.train.tokens, plan.recipe.context, plan.recipe.batch, plan.seed)
        self.top = ceiling(plan.cfg, ceilings)
        self.residuals = FLOAT32 * residual_count(plan.cfg, plan.recipe.batch, plan.recipe.context)
        # At the fullest moment of a step: weights and moments, old and new, gradient, logits three times.
        logits = plan.step_tokens * plan.cfg.vocab
        self.memory = self.residuals + FLOAT32 * (7 * count_params(plan.cfg).total + 3 * logits)
        steps, long = plan.predict(plan.step_flops / (EXPECTED * self.top))
        self.rows = rows | {
            "memory": f"about {size(self.memory)} of {size(memory_limit())} that are left for a step; each forward pass "
            f"keeps {size(self.residuals)} for its backward pass",
            "predicted": f"{steps:,} steps, {long}, at {EXPECTED:.0%} of what this machine multiplies in float32",
        }
        # Its optimizer has a name of its own, so that no run of JAX's tries to go on from its state.
        recipe = dataclasses.asdict(plan.recipe)
        recipe["optimizer"]["kind"] = "adamw by hand"
        self._facts = facts | {"recipe": as_json(recipe)}

    def load_weights(self) -> None:
        """Raises UserError when a step would need more than there is; weights begin random."""
        if self.memory > memory_limit():
            raise UserError(
                f"Training {self.plan.name} by hand needs about {size(self.memory)}, of which {size(self.residuals)} are kept "
                f"by the forward pass for the backward pass, and {size(memory_limit())} are left for it. Give a smaller "
                "--batch or --context, or a smaller preset."
            )

    def facts(self) -> dict[str, Any]:
        """Returns the entries of run.json about text and optimizer."""
        return self._facts

    def print_plan(self) -> None:
        """Prints the banner."""
        self.console.print_rows(list(self.rows.items()))

    def initial_state(self) -> TrainState:
        """Returns JAX's random weights, and moments of zero."""

        def make() -> TrainState:
            params = init_params(self.plan.cfg, jax.random.key(self.plan.seed))
            zeros, none = jax.tree.map(jnp.zeros_like, params), jnp.int32(0)
            return TrainState(none, params, adamw.Moments(none, zeros, zeros))  # type: ignore[arg-type]

        return jax.jit(make)()

    def measure_before(self) -> None:
        """Measures nothing: random weights know nothing."""

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> TrainingSteps:
        """Returns the steps; nothing has to be compiled."""
        cfg, optimizer = self.plan.cfg, self.plan.recipe.optimizer
        schedule = jax.jit(make_schedule(optimizer))
        settings = adamw.Settings(
            optimizer.learning_rate, optimizer.beta1, optimizer.beta2, weight_decay=optimizer.weight_decay, clip=optimizer.clip
        )

        def step(state: Any, batch: Any, progress: Any) -> tuple[TrainState, Metrics]:
            state = jax.tree.map(np.asarray, state)  # the first one comes from JAX
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below, and counted
                loss, gradient = by_hand.loss_and_gradient(
                    cfg, state.trainable, batch.tokens, batch.targets, batch.mask, batch.positions, batch.segments
                )
                norm = adamw.norm(gradient)
                params, moments = adamw.step(settings, state.trainable, gradient, state.opt_state, float(schedule(progress)))
            sound = math.isfinite(loss) and math.isfinite(norm)
            trainable, opt_state = (params, moments) if sound else (state.trainable, state.opt_state)
            metrics: Any = (loss, batch.mask.sum(), norm, int(not sound))
            return TrainState(state.step + 1, trainable, opt_state), Metrics(*metrics)

        evaluator = self._evaluator(nats_by_hand)
        return TrainingSteps(step, self.batches, evaluator, self.plan, loop_state.step, self.top, ADVICE)

    def report(self, state: TrainState, loop: Loop) -> RunReport:
        """Evaluates on the whole validation text, continues its beginning, and compares NumPy with JAX."""
        cfg, tokenizer, params = self.plan.cfg, self.tokenizer, jax.tree.map(np.asarray, state.trainable)
        prompt = self.data.validation.tokens[: max(1, cfg.context // 4)].tolist()
        sample = lambda: tokenizer.decode(prompt + list(generate(cfg, params, prompt, max_tokens=SAMPLE, end=tokenizer.end)))
        in_numpy, in_jax = (self._evaluator(nats_of).evaluate(params) for nats_of in (nats_by_hand, score))
        source = f"the first {len(prompt)} tokens are {self.data.validation_name}'s, each after that the most probable"
        remarks = [
            ("sample", source),
            ("one model", f"{in_numpy:.4f} bits per byte (quick) by NumPy, {in_jax:.4f} by JAX with the same weights"),
        ]
        if self.plan.steps and not self.plan.seconds:  # by time, the schedule would follow each one's own speed
            same = command_line("train", self.plan.name, "--optimizer", "adamw", "--dtype", "float32")
            remarks.append(("in JAX", f"{same}, with the same other flags, takes the same steps"))
        epoch = self.batches.epoch(loop.loop_state.step)
        return training_report(
            self.plan, self.data, params, loop.loop_state, epoch, loop.config.folder, self.console, sample, remarks
        )

    def summary(self, result: dict[str, Any]) -> str:
        """Returns the result in words."""
        return f"{result['val_bits_per_byte']:.3f} bits per byte"

    def _evaluator(self, nats_of: Any) -> TextEvaluator:
        cfg = self.plan.cfg
        return TextEvaluator(cfg, self.data.validation, self.tokenizer, cfg.context, rows_for(cfg, cfg.context), nats_of)


def nats_by_hand(cfg: Any, params: Any, batch: Any) -> float:
    """Returns the summed nats of a batch's targets, in NumPy."""
    mean = by_hand.loss(cfg, params, batch.tokens, batch.targets, batch.mask, batch.positions, batch.segments)
    return mean * int(batch.mask.sum())

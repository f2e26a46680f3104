"""Trains from random weights in NumPy, by engine/by_hand.

The rest is as in any run: JAX makes the first weights and the schedule, and at the end scores the validation text.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine import by_hand
from engine.by_hand import adamw
from engine.by_hand.generate import generate
from engine.by_hand.model import residual_count
from engine.counting.hardware import Ceilings, require_memory
from engine.counting.params import count_params
from engine.format import format_bytes
from engine.inference.score import score
from engine.model.transformer import init_params
from engine.training.optimizer import make_schedule
from engine.training.step import StepMetrics, TrainState
from stages.cli.command import command_line
from stages.cli.console import Console
from stages.runs.data.text import TextData
from stages.runs.estimate import RunPlan, memory_limit
from stages.runs.training_steps import Program
from stages.runs.validation import quick_evaluator
from stages.train.trainer import Trainer

FLOAT32 = 4  # bytes


class NumPyTrainer(Trainer):
    """Trains with the NumPy model and its own AdamW, in float32."""

    expected_mfu = 0.15  # of the float32 ceiling, measured with the tiny preset
    optimizer_name = "adamw by hand"
    advice = "--learning-rate, or warm up longer with --warmup"

    def __init__(self, plan: RunPlan, data: TextData) -> None:
        self.plan, self.data = plan, data
        self.prompt: list[int] = data.validation.tokens[: max(1, plan.cfg.context // 4)].tolist()
        self.residuals = FLOAT32 * residual_count(plan.cfg, plan.recipe.batch, plan.recipe.context)
        # The peak of a step: weights and moments, old and new, gradient, logits three times.
        numbers = 7 * count_params(plan.cfg).total + 3 * plan.step_tokens * plan.cfg.vocab
        self.memory = self.residuals + FLOAT32 * numbers
        self.memory_note = f"; each forward pass keeps {format_bytes(self.residuals)} for its backward pass"

    def step_seconds(self, plan: RunPlan, best: Ceilings) -> float:
        """Predicts the seconds of a step; `expected_mfu` is that of whole steps."""
        return plan.step_flops / (self.expected_mfu * best.peak_flops(plan.cfg.dtype))

    @staticmethod
    def nats(cfg: Any, params: Any, batch: Any) -> float:
        return by_hand.loss(cfg, params, *batch) * int(batch.mask.sum())

    def check_memory(self) -> None:
        """Raises UserError when a step does not fit memory."""
        require_memory(
            self.memory, f"Training {self.plan.name} by hand needs about",
            "give a smaller --batch or --context, or a smaller preset.",
            detail=f" ({format_bytes(self.residuals)} kept by the forward pass for the backward pass)", limit=memory_limit(),
        )  # fmt: skip

    def initial_state(self) -> TrainState:
        """Returns JAX's first weights and moments of zero, as JAX arrays: a step converts them."""

        def make() -> TrainState:
            params = init_params(self.plan.cfg, jax.random.key(self.plan.seed))
            zeros, none = jax.tree.map(jnp.zeros_like, params), jnp.int32(0)
            return TrainState(none, params, adamw.Moments(none, zeros, zeros))  # type: ignore[arg-type]

        return jax.jit(make)()

    def make_program(self, console: Console) -> Program:
        cfg, optimizer = self.plan.cfg, self.plan.recipe.optimizer
        schedule = jax.jit(make_schedule(optimizer))
        settings = adamw.AdamWConfig(
            optimizer.learning_rate, optimizer.beta1, optimizer.beta2, weight_decay=optimizer.weight_decay, clip=optimizer.clip,
            embedding_factor=optimizer.embedding_factor, head_factor=optimizer.head_factor,
        )  # fmt: skip

        def step(state: Any, batch: Any, progress: Any) -> tuple[TrainState, StepMetrics]:
            state = jax.tree.map(np.asarray, state)  # the first one comes from JAX
            with np.errstate(over="ignore", invalid="ignore"):  # a step that is not finite is refused below
                loss, gradient = by_hand.loss_and_gradient(cfg, state.trainable, *batch)
                norm = adamw.global_norm(gradient)
                params, moments = adamw.step(settings, state.trainable, gradient, state.opt_state, float(schedule(progress)))
            sound = math.isfinite(loss) and math.isfinite(norm)
            trainable, opt_state = (params, moments) if sound else (state.trainable, state.opt_state)
            metrics: Any = (loss, batch.mask.sum(), norm, int(not sound))
            return TrainState(state.step + 1, trainable, opt_state), StepMetrics(*metrics)

        return step

    def sample(self, params: Any, max_tokens: int) -> str:
        """Returns the beginning of the validation text, continued greedily by NumPy."""
        params, tokenizer = jax.tree.map(np.asarray, params), self.data.tokenizer
        tokens = generate(self.plan.cfg, params, self.prompt, max_tokens=max_tokens, eos_id=tokenizer.eos_id)
        return tokenizer.decode(self.prompt + list(tokens))

    def remarks(self, params: Any) -> list[tuple[str, str]]:
        """Returns rows: the sample's prompt, bits per byte by NumPy and by JAX, and the command for the same run in JAX."""
        params, data = jax.tree.map(np.asarray, params), self.data
        in_numpy, in_jax = (
            quick_evaluator(self.plan.cfg, data.validation, data.tokenizer, nats_of).evaluate(params)
            for nats_of in (self.nats, score)
        )
        tokens = f"the first {len(self.prompt)} tokens are {data.validation_name}'s"
        rows = [
            ("sample", f"{tokens}, each after that the most probable"),
            ("one model", f"{in_numpy:.4f} bits per byte (quick) by NumPy, {in_jax:.4f} by JAX with the same weights"),
        ]
        if self.plan.steps and not self.plan.seconds:  # by time, the schedule would follow each one's own speed
            same = command_line("train", self.plan.name, "--optimizer", "adamw", "--dtype", "float32")
            rows.append(("in JAX", f"{same}, with the same other flags, takes the same steps"))
        return rows

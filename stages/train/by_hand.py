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
from engine.counting.params import count_params
from engine.format import size
from engine.model.transformer import init_params
from engine.training.optimizer import make_schedule
from engine.training.step import Metrics, TrainState
from stages.cli.command import command_line
from stages.runs.estimate import memory_limit, require_memory
from stages.runs.folder import as_json
from stages.runs.loop import LoopState
from stages.runs.training_steps import TrainingSteps
from stages.train.training import SAMPLE, Training

FLOAT32 = 4  # bytes
EXPECTED = 0.15  # of the float32 ceiling, as measured with the tiny preset, whose products are small
ADVICE = "--learning-rate, or warm up longer with --warmup"


class TrainingByHand(Training):
    """Training from random weights in NumPy: a Stage."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        plan = self.plan
        self.residuals = FLOAT32 * residual_count(plan.cfg, plan.recipe.batch, plan.recipe.context)
        # At the fullest moment of a step: weights and moments, old and new, gradient, logits three times.
        logits = plan.step_tokens * plan.cfg.vocab
        self.memory = self.residuals + FLOAT32 * (7 * count_params(plan.cfg).total + 3 * logits)
        # Its optimizer has a name of its own, so that no run of JAX's tries to go on from its state.
        recipe = dataclasses.asdict(plan.recipe)
        recipe["optimizer"]["kind"] = "adamw by hand"
        self.facts |= {"recipe": as_json(recipe)}

    def banner(self) -> dict[str, str]:
        steps, long = self.plan.predict(self.plan.step_flops / (EXPECTED * self.top))
        return super().banner() | {
            "memory": f"about {size(self.memory)} of {size(memory_limit())} that are left for a step; each forward pass "
            f"keeps {size(self.residuals)} for its backward pass",
            "predicted": f"{steps:,} steps, {long}, at {EXPECTED:.0%} of what this machine multiplies in float32",
        }

    def load_weights(self) -> None:
        """Checks that there is room for a step; weights begin random."""
        needed = (
            f"Training {self.plan.name} by hand needs about {size(self.memory)}, of which {size(self.residuals)} are kept "
            "by the forward pass for the backward pass"
        )
        require_memory(self.memory, needed, "give a smaller --batch or --context, or a smaller preset.")

    def initial_state(self) -> TrainState:
        """Returns JAX's random weights, and moments of zero."""

        def make() -> TrainState:
            params = init_params(self.plan.cfg, jax.random.key(self.plan.seed))
            zeros, none = jax.tree.map(jnp.zeros_like, params), jnp.int32(0)
            return TrainState(none, params, adamw.Moments(none, zeros, zeros))  # type: ignore[arg-type]

        return jax.jit(make)()

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> TrainingSteps:
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

        evaluator = self.evaluator(nats_by_hand)
        return TrainingSteps(step, self.batches, evaluator, self.plan, loop_state.step, self.top, ADVICE)

    def sample(self, params: Any) -> str:
        """Returns the beginning of the validation text and what follows by NumPy, each token the most probable."""
        params, prompt = jax.tree.map(np.asarray, params), self._prompt()
        tokens = generate(self.plan.cfg, params, prompt, max_tokens=SAMPLE, end=self.tokenizer.end)
        return self.tokenizer.decode(prompt + list(tokens))

    def _prompt(self) -> list[int]:
        return self.data.validation.tokens[: max(1, self.plan.cfg.context // 4)].tolist()

    def remarks(self, params: Any) -> list[tuple[str, str]]:
        """Returns rows on the sample, on NumPy beside JAX, and on the same run in JAX."""
        params = jax.tree.map(np.asarray, params)
        in_numpy, in_jax = (evaluator.evaluate(params) for evaluator in (self.evaluator(nats_by_hand), self.evaluator()))
        tokens = f"the first {len(self._prompt())} tokens are {self.data.validation_name}'s"
        rows = [
            ("sample", f"{tokens}, each after that the most probable"),
            ("one model", f"{in_numpy:.4f} bits per byte (quick) by NumPy, {in_jax:.4f} by JAX with the same weights"),
        ]
        if self.plan.steps and not self.plan.seconds:  # by time, the schedule would follow each one's own speed
            same = command_line("train", self.plan.name, "--optimizer", "adamw", "--dtype", "float32")
            rows.append(("in JAX", f"{same}, with the same other flags, takes the same steps"))
        return rows


def nats_by_hand(cfg: Any, params: Any, batch: Any) -> float:
    """Returns the summed nats of a batch's targets, in NumPy."""
    mean = by_hand.loss(cfg, params, batch.tokens, batch.targets, batch.mask, batch.positions, batch.segments)
    return mean * int(batch.mask.sum())

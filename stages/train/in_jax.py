"""Training from random weights in JAX: an `Implementation`."""

from typing import Any

import jax
import numpy as np

from engine.counting.hardware import Ceilings
from engine.counting.params import count_params
from engine.format import count, size
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from engine.inference.score import score
from engine.model.transformer import init_params
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state, train_step
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, ceiling, memory_limit, require_memory
from stages.runs.text_data import TextData
from stages.runs.training_steps import Program

# A step is predicted to take its products at this share of the ceiling, the optimizer's traffic, and its dispatch.
EXPECTED = 0.5
UPDATE = 28  # bytes a parameter
FIXED = 0.002  # seconds


class InJax:
    """Trains by `train_step`, with any of its optimizers, in float32 or bfloat16."""

    advice = "--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32"
    nats = staticmethod(score)

    def __init__(self, plan: RunPlan, data: TextData) -> None:
        self.plan, self.data = plan, data
        self.optimizer_name: str = plan.recipe.optimizer.kind
        self.optimizer = make_optimizer(plan.recipe.optimizer)

    def check_memory(self) -> None:
        """Raises UserError when there is no room for weights, gradients and optimizer."""
        least = count_params(self.plan.cfg).total * (16 if self.optimizer_name == "adamw" else 12)
        needed = f"Training {self.plan.name} needs at least {size(least)} for weights, gradients and optimizer"
        require_memory(least, needed, "choose a smaller preset.")

    def estimates(self, best: Ceilings) -> tuple[str, str]:
        plan, top, limit = self.plan, ceiling(self.plan.cfg, best), memory_limit()
        update = UPDATE * count_params(plan.cfg).total / (1e9 * best.update_gbs)
        steps, long = plan.predict(plan.step_flops / (EXPECTED * top) + update + FIXED)
        epochs = steps * plan.step_tokens / (len(self.data.train.tokens) - 1)
        tight = "  ** more than there is: smaller --batch, --accumulate or --remat **" if plan.memory > limit else ""
        return (
            f"about {size(plan.memory)} of {size(limit)} that are left for a step{tight}",
            f"{steps:,} steps, {epochs:.2g} epochs, {long} at half of this machine's {count(top)}FLOP/s in {plan.cfg.dtype}",
        )

    def initial_state(self) -> TrainState:
        cfg, seed = self.plan.cfg, self.plan.seed
        return jax.jit(lambda: init_state(self.optimizer, init_params(cfg, jax.random.key(seed))))()

    def make_program(self, state: TrainState, batch: Any, console: Console) -> Program:
        plan = self.plan
        with console.task("compiling", always=True):
            compiled = train_step.lower(
                plan.cfg, self.optimizer, state, {}, batch, np.float32(0), microbatches=plan.recipe.accumulate
            ).compile()
        return lambda state, batch, progress: compiled(state, {}, batch, progress)

    def sample(self, params: Any, max_tokens: int) -> str:
        """Returns a text that the model writes after a line end."""
        cfg, tokenizer = self.plan.cfg, self.data.tokenizer
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=self.plan.seed, stop_token_ids=(tokenizer.end,))
        pieces = generate(cfg, for_inference(cfg, params), [tokenizer.encode("\n").tolist()], [sampling])
        return tokenizer.decode([token for piece in pieces for token in piece.tokens])

    def remarks(self, params: Any) -> list[tuple[str, str]]:
        return []

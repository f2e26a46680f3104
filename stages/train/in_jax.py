"""Training from random weights in JAX. `by_hand.ByHand` has the same methods in NumPy."""

from typing import Any

import jax

from engine.counting.hardware import Ceilings
from engine.counting.params import count_params
from engine.format import count, size
from engine.inference.decode import generate, prepare_params
from engine.inference.sampling_params import SamplingParams
from engine.inference.score import score
from engine.model.transformer import init_params
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, ceiling, memory_estimate, memory_limit, require_memory
from stages.runs.text_data import TextData
from stages.runs.training_steps import Program, compile_step

# The predicted time of a step: its products at this share of the ceiling, the optimizer's traffic, and its dispatch.
EXPECTED = 0.5
UPDATE = 28  # bytes a parameter
FIXED = 0.002  # seconds


class InJax:
    """Trains by `train_step`, in float32 or bfloat16, with the optimizer that its name in run.json says."""

    advice = "--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32"
    nats: Any = staticmethod(score)  # (cfg, params, batch) -> the summed nats of the batch's targets

    def __init__(self, plan: RunPlan, data: TextData) -> None:
        self.plan, self.data = plan, data
        self.optimizer_name: str = plan.recipe.optimizer.kind

    def check_memory(self) -> None:
        """Raises UserError when there is no room for weights, gradients and optimizer."""
        least = count_params(self.plan.cfg).total * (16 if self.optimizer_name == "adamw" else 12)
        needed = f"Training {self.plan.name} needs at least {size(least)} for weights, gradients and optimizer"
        require_memory(least, needed, "choose a smaller preset.")

    def estimates(self, best: Ceilings) -> tuple[str, str]:
        """Returns in words the memory of a step, and how long the run is predicted to take."""
        plan, top = self.plan, ceiling(self.plan.cfg, best)
        update = UPDATE * count_params(plan.cfg).total / (1e9 * best.update_gbs)
        steps, long = plan.predict(plan.step_flops / (EXPECTED * top) + update + FIXED)
        epochs = steps * plan.step_tokens / (len(self.data.train.tokens) - 1)
        tight = "  ** more than there is: smaller --batch, --accumulate or --remat **" * (plan.memory > memory_limit())
        return (
            f"{memory_estimate(plan.memory, 'step')}{tight}",
            f"{steps:,} steps, {epochs:.2g} epochs, {long} at half of this machine's {count(top)}FLOP/s in {plan.cfg.dtype}",
        )

    def initial_state(self) -> TrainState:
        """Returns random weights and the optimizer's state before the first step; can be traced."""
        plan, optimizer = self.plan, make_optimizer(self.plan.recipe.optimizer)
        return jax.jit(lambda: init_state(optimizer, init_params(plan.cfg, jax.random.key(plan.seed))))()

    def make_program(self, state: TrainState, batch: Any, console: Console) -> Program:
        """Returns the program of a step, for states and batches of these shapes."""
        with console.task("compiling", always=True):
            compiled = compile_step(self.plan, state, {}, batch)
        return lambda state, batch, progress: compiled(state, {}, batch, progress)

    def sample(self, params: Any, max_tokens: int) -> str:
        """Returns a text that the model writes after a line end."""
        cfg, tokenizer = self.plan.cfg, self.data.tokenizer
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=self.plan.seed, stop_token_ids=(tokenizer.end,))
        pieces = generate(cfg, prepare_params(cfg, params), [tokenizer.encode("\n").tolist()], [sampling])
        return tokenizer.decode([token for piece in pieces for token in piece.tokens])

    def remarks(self, params: Any) -> list[tuple[str, str]]:
        """Returns more rows for the last screen."""
        return []

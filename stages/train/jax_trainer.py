"""Trains from random weights in JAX."""

import concurrent.futures
import contextlib
from typing import Any

import jax

from engine.allocator import return_freed_memory
from engine.counting.flops import muon_flops, train_flops
from engine.counting.hardware import Ceilings
from engine.counting.params import count_params
from engine.inference.decode import complete, prepare_params
from engine.inference.request import SamplingParams
from engine.inference.score import score
from engine.model.transformer import init_params
from engine.placement import current_mesh, sharded_shapes
from engine.sharding import group_columns
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state
from stages.cli.console import Console
from stages.runs.data.text import TextData
from stages.runs.estimate import RunPlan, memory_limit
from stages.runs.training_steps import Program, lower_step, temporary_bytes
from stages.train.trainer import Trainer

UPDATE_BYTES = 28  # moved a parameter by the optimizer
DISPATCH = 0.002  # seconds a step


class JaxTrainer(Trainer):
    """Trains by `train_step`, in float32 or bfloat16."""

    expected_mfu = 0.5  # of the ceiling, for the products of a step
    advice = "--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32"
    nats: Any = staticmethod(score)

    def __init__(self, plan: RunPlan, data: TextData) -> None:
        self.plan, self.data, self.memory = plan, data, plan.memory.total
        self.optimizer_name: str = plan.recipe.optimizer.kind
        is_tight = self.memory > memory_limit(plan.mesh)
        optimizer, key = make_optimizer(plan.recipe.optimizer), lambda: jax.random.key(plan.seed)
        # One object, for JAX traces it only once.
        self.begin = jax.jit(lambda: init_state(optimizer, group_columns(plan.cfg, init_params(plan.cfg, key()))))
        self.memory_note = "  ** more than there is: smaller --batch, --accumulate or --remat **" * is_tight

    def check_memory(self) -> None:
        """Raises UserError when weights, gradients and optimizer state alone do not fit."""
        plan, (_, fsdp, tensor) = self.plan, self.plan.mesh
        least = count_params(plan.cfg).total * (16 if self.optimizer_name == "adamw" else 12) // (fsdp * tensor)
        plan.require(
            least, f"Training {plan.name} needs at least", "choose a smaller preset.", " for weights, gradients and optimizer"
        )  # fmt: skip

    def step_seconds(self, plan: RunPlan, best: Ceilings) -> float:
        """Predicts the seconds of a step's products (remat's and Muon's too), the optimizer's traffic, and the dispatch."""
        cfg, is_muon = plan.cfg, plan.recipe.optimizer.kind == "muon"
        flops = train_flops(cfg, plan.recipe.context, attention="full").total * plan.step_tokens
        products = (flops + is_muon * muon_flops(cfg)) / best.peak_flops(cfg.dtype)
        return products / self.expected_mfu + UPDATE_BYTES * count_params(cfg).total / (1e9 * best.update_gbs) + DISPATCH

    def initial_state(self) -> TrainState:
        return self.begin()

    def begin_compiling(self, batch: Any, beside_reading: bool) -> None:
        """Compiles in a thread: from shapes, for hashing and reading a checkpoint leave Python to it.

        Making a state does not: it waits until the step is traced, and goes on beside XLA.
        """
        plan, state, mesh = self.plan, sharded_shapes(self.begin), current_mesh()

        def lower_on_mesh() -> Any:
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                return lower_step(plan.cfg, plan.recipe.optimizer, plan.recipe.accumulate, state, {}, batch)

        thread = concurrent.futures.ThreadPoolExecutor(1)
        lowering = thread.submit(lower_on_mesh)
        self.compiling = thread.submit(lambda: lowering.result().compile())
        if not beside_reading:
            lowering.result()

    def make_program(self, console: Console) -> Program:
        with console.task("compiling", always=True):
            compiled = self.compiling.result()
        self.buffer_bytes = temporary_bytes(compiled)
        return_freed_memory()  # of compiling and of making the first state
        return lambda state, batch, progress: compiled(state, {}, batch, progress)

    def sample(self, params: Any, max_tokens: int) -> str:
        """Samples a text from the model after a line end."""
        cfg, tokenizer = self.plan.cfg, self.data.tokenizer
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.8, seed=self.plan.seed, stop_token_ids=(tokenizer.eos_id,)
        )
        [(tokens, _)] = complete(cfg, prepare_params(cfg, params), [tokenizer.encode("\n").tolist()], [sampling])
        return tokenizer.decode(tokens)

    def remarks(self, params: Any) -> list[tuple[str, str]]:
        """Returns no rows."""
        return []

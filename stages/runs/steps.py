"""Compiles a training step, and runs it on one batch after another."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from engine.allocator import make_room
from engine.mesh.layout import batch_share, global_batch
from engine.training.optimizer import make_optimizer, make_schedule
from engine.training.step import NEXT_TOKEN, Objective, TrainState, train_step
from stages.runs.estimate import RunPlan
from stages.runs.stage import Evaluator, LoopState, Steps

LARGE_BUFFER = 2**27  # bytes


class MeshBatches:
    """Batches by step over the mesh of `jax.set_mesh`: each process reads its own rows alone.

    `epoch`: how often all data was read before a step.
    """

    def __init__(self, batches: Any) -> None:
        self.batches, self.epoch = batches, batches.epoch
        shares, share = batch_share(batches.order.batch)
        rows = batches.order.batch // shares
        self.rows = slice(share * rows, (share + 1) * rows)

    def at(self, step: int) -> Any:
        return global_batch(self.batches.at(step, self.rows))


def compile_step(
    plan: RunPlan, state: TrainState, frozen: Any, batch: Any, objective: Objective = NEXT_TOKEN,
    on_traced: Callable[[], None] = lambda: None,
) -> Compiled:  # fmt: skip
    """Compiles `train_step` to (state, frozen, batch, progress) -> (state, metrics); calls `on_traced` before XLA begins.

    The arguments may be shapes.
    """
    tx, microbatches = make_optimizer(plan.recipe.optimizer), plan.recipe.accumulate
    lowered = train_step.lower(
        plan.cfg, tx, state, frozen, batch, np.float32(0), microbatches=microbatches, objective=objective
    )
    on_traced()
    return lowered.compile(plan.compiler_options)


def temporary_bytes(compiled: Compiled) -> int:
    """Returns the bytes of a step's temporary buffer in the host's memory, 0 for a small one: moving it costs page faults."""
    analysis = compiled.memory_analysis() if jax.default_backend() == "cpu" else None
    return size if analysis and (size := analysis.temp_size_in_bytes) >= LARGE_BUFFER else 0


class TrainingSteps(Steps):
    """The Steps of training and fine-tuning: runs a program on one batch after another, from the state's step on.

    `peak_flops`: this machine's, a second.
    """

    def __init__(
        self, program: Compiled, frozen: Any, batches: MeshBatches, evaluator: Evaluator, plan: RunPlan, loop_state: LoopState,
        peak_flops: float, advice: str,
    ) -> None:  # fmt: skip
        self.program, self.frozen, self.batches = program, frozen, batches
        self.plan, self.buffer_bytes = plan, temporary_bytes(program)
        self.evaluator = evaluator
        self.peak_flops, self.advice = peak_flops, advice
        self.schedule = jax.jit(make_schedule(plan.recipe.optimizer))
        self.batch = batches.at(loop_state.step)
        self.losses: list[float] = []
        self.loss = self.grad_norm = float("nan")

    def run(self, state: TrainState, loop_state: LoopState) -> tuple[TrainState, list[bool]]:
        step, progress = loop_state.step, np.float32(self.plan.progress(loop_state.step, loop_state.seconds))
        # Memory allocated during a step ends up above its buffer and fragments the heap: make the batch before it.
        following = self.batches.at(step + 1) if self.buffer_bytes else None
        make_room(self.buffer_bytes)  # the last step's, in whose place a save's buffers may lie
        state, metrics = self.program(state, self.frozen, self.batch, progress)
        self.trained_batch = self.batch
        self.batch = following or self.batches.at(step + 1)
        # Wait before the next dispatch: two steps in flight would take twice the memory.
        metrics = jax.device_get(metrics)
        self.loss, self.grad_norm = float(metrics.loss), float(metrics.grad_norm)
        self.losses.append(self.loss)
        return state, [bool(metrics.refused)]

    def metrics(self, loop_state: LoopState, step_seconds: float) -> dict[str, float]:
        """Returns the mean loss since the last call, gradient norm, learning-rate factor, tokens/s, and refused steps."""
        loss = sum(self.losses) / len(self.losses)  # the mean since the last line
        self.losses = []
        return {
            "loss": loss, "grad_norm": self.grad_norm, "learning_rate_factor": self._factor(loop_state),
            "tokens_per_second": self.plan.step_tokens / step_seconds, "refused": loop_state.refused,
        }  # fmt: skip

    def fields(self, loop_state: LoopState, step_seconds: float) -> list[str]:
        """Returns loss, learning-rate factor, gradient norm, tokens/s, MFU and epoch, in words."""
        plan, epoch = self.plan, self.batches.epoch(loop_state.step)
        return [
            f"loss {self.loss:.3f}",
            f"lr {self._factor(loop_state):.0%}",
            f"grad {self.grad_norm:.2f}",
            f"{plan.step_tokens / step_seconds:,.0f} tokens/s",
            f"MFU {plan.step_flops / step_seconds / self.peak_flops:.0%}",
            f"epoch {epoch:.2f}" if epoch < 10 else f"epoch {epoch:,.0f}",
        ]

    def _factor(self, loop_state: LoopState) -> float:
        return float(self.schedule(np.float32(self.plan.progress(loop_state.step, loop_state.seconds))))

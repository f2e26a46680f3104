"""BatchSteps: the steps of a run whose program reads one batch after another, in a known order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Compiled

from engine.allocator import make_room
from engine.mesh.layout import batch_share, global_batch
from engine.text.batch import EpochOrder
from engine.training.optimizer import make_schedule
from engine.training.step import TrainState
from stages.runs.plan import RunPlan
from stages.runs.stage import LoopState, StepResult
from stages.runs.text_evaluators import Evaluator

LARGE_BUFFER = 2**27  # bytes; moving a larger one costs page faults


class MeshBatches:
    """Batches by step over the mesh of `jax.set_mesh`: each process reads its own rows, by
    `read(step, rows)`, alone."""

    def __init__(self, order: EpochOrder, read: Callable[[int, slice], Any]) -> None:
        self.read = read
        self.epoch = order.epoch
        shares, share = batch_share(order.batch)
        rows = order.batch // shares
        self.rows = slice(share * rows, (share + 1) * rows)

    def at(self, step: int) -> Any:
        return global_batch(self.read(step, self.rows))


def temporary_bytes(compiled: Compiled) -> int:
    """Returns the bytes of a step's temporary buffer in the host's memory, 0 for a small one."""
    if jax.default_backend() != "cpu":
        return 0
    analysis = compiled.memory_analysis()
    if analysis is None or analysis.temp_size_in_bytes < LARGE_BUFFER:
        return 0
    return analysis.temp_size_in_bytes


class BatchMetrics(NamedTuple):
    """The metrics of one step on the host."""

    loss: float
    grad_norm: float


NO_METRICS = BatchMetrics(float("nan"), float("nan"))  # before the first step


class BatchSteps:
    """Steps that run a program, (state, frozen, batch, progress) -> (state, metrics), on a batch
    each."""

    lines_stay = False

    def __init__(
        self,
        plan: RunPlan,
        program: Compiled,
        buffer_bytes: int,
        frozen: Any,
        batches: MeshBatches,
        evaluator: Evaluator,
        first_step: int,
        peak_flops: float,
    ) -> None:
        """`buffer_bytes`: the program's `temporary_bytes`; `peak_flops`: this machine's, a second."""
        self.plan = plan
        self.program: Callable[..., Any] = program
        self.buffer_bytes = buffer_bytes
        self.frozen = frozen
        self.batches = batches
        self.evaluator: Evaluator | None = evaluator
        self.peak_flops = peak_flops
        self.schedule = jax.jit(make_schedule(plan.recipe.optimizer))
        self.next_batch = batches.at(first_step)

    def step(self, state: TrainState, loop_state: LoopState) -> StepResult:
        batch = self.next_batch
        following = loop_state.step + 1
        # Memory allocated while a step holds a buffer ends up above it and fragments the heap: then
        # the next batch is made before the step, else beside it.
        is_batch_first = self.buffer_bytes > 0
        if is_batch_first:
            self.next_batch = self.batches.at(following)
            # In the place of the last step's buffer a save's may lie.
            make_room(self.buffer_bytes)
        progress = np.float32(self.plan.progress(loop_state.step, loop_state.seconds))
        state, metrics = self.program(state, self.frozen, batch, progress)
        if not is_batch_first:
            self.next_batch = self.batches.at(following)
        # Wait before the next dispatch: two steps in flight would take twice the memory.
        metrics = jax.device_get(metrics)
        return StepResult(
            state=state,
            refused=[bool(metrics.refused)],
            metrics=BatchMetrics(float(metrics.loss), float(metrics.grad_norm)),
            trained_batch=batch,
        )

    def is_exhausted(self, loop_state: LoopState) -> bool:
        return False

    def log_fields(
        self, metrics: list[BatchMetrics], loop_state: LoopState, step_seconds: float
    ) -> dict[str, float]:
        return {
            "loss": sum(step.loss for step in metrics) / len(metrics),
            "grad_norm": metrics[-1].grad_norm,
            "learning_rate_factor": self._learning_rate_factor(loop_state),
            "tokens_per_second": self.plan.step_tokens / step_seconds,
            "refused": loop_state.refused,
        }

    def live_fields(
        self, metrics: BatchMetrics | None, loop_state: LoopState, step_seconds: float
    ) -> list[str]:
        last = metrics or NO_METRICS
        plan = self.plan
        epoch = self.batches.epoch(loop_state.step)
        shown_epoch = f"{epoch:,.0f}"
        if epoch < 10:
            shown_epoch = f"{epoch:.2f}"
        return [
            f"loss {last.loss:.3f}",
            f"lr {self._learning_rate_factor(loop_state):.0%}",
            f"grad {last.grad_norm:.2f}",
            f"{plan.step_tokens / step_seconds:,.0f} tokens/s",
            f"MFU {plan.step_flops / step_seconds / self.peak_flops:.0%}",
            f"epoch {shown_epoch}",
        ]

    def _learning_rate_factor(self, loop_state: LoopState) -> float:
        return float(self.schedule(np.float32(self.plan.progress(loop_state.step, loop_state.seconds))))

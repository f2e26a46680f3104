"""Stage, the interface of a way to train; BatchStage, whose steps are batches of data; and LoopState, the progress of a run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.stages import Compiled

from engine.device import make_room
from engine.mesh.layout import batch_share, global_batch
from engine.text.batch import EpochOrder
from engine.text.tokenizer import Tokenizer
from engine.training.optimizer import make_optimizer, make_schedule
from engine.training.step import NEXT_TOKEN, Objective, TrainState, train_step
from stages.runs.plan import RunPlan
from stages.runs.text_data import Evaluator

LARGE_BUFFER = 2**27  # bytes; moving a larger one costs page faults


@dataclasses.dataclass
class LoopState:
    """The progress of a run, beside weights and optimizer: saved in a checkpoint's state.json.

    When to evaluate, save, log and stop follows from this alone, so that a restart changes none of it. A field that an
    older checkpoint lacks has its default.
    """

    step: int = 0
    seconds: float = 0.0  # of training: without compiling, evaluating and saving
    refused: int = 0  # updates that were not finite
    refused_in_a_row: int = 0
    refused_batch: int | None = None  # of the last one
    validation: float | None = None  # the last quick one
    best: float | None = None  # the lowest quick validation, or the highest mean reward
    best_step: int | None = None
    since_best: int = 0  # quick validations
    evaluation_seconds: float = 0.0  # of the longest quick validation
    first_step_seconds: float | None = None  # from the start of the process
    predicted: tuple[int, float] | None = None  # steps and seconds of the whole run, by what its first steps took
    intervals: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # name -> step and seconds it began at
    stage: dict[str, Any] = dataclasses.field(default_factory=dict)  # the stage's own, replaced and never changed in place

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "LoopState":
        """Returns the state of a checkpoint's state.json. Raises KeyError, TypeError or ValueError for a damaged one."""
        known = {field.name: record[field.name] for field in dataclasses.fields(cls) if field.name in record}
        state = cls(**known | {"step": int(record["step"]), "seconds": float(record["seconds"])})
        state.intervals = {name: (step, seconds) for name, (step, seconds) in state.intervals.items()}
        return state

    def is_due(self, name: str, length: int | float) -> bool:
        step, seconds = self.intervals[name]
        return (self.step - step if isinstance(length, int) else self.seconds - seconds) >= length

    def begin(self, name: str) -> None:
        self.intervals = self.intervals | {name: (self.step, self.seconds)}

    def forget_best(self) -> None:
        self.best, self.best_step, self.since_best = None, None, 0


class RunReport(NamedTuple):
    """The stage's part of run.json's result and of the summary."""

    result: dict[str, Any]
    texts: list[tuple[str, str]]  # under headings
    rows: list[tuple[str, str]]  # the first is the result in short
    saved: str
    next_stages: list[str]  # that take the model


class Stage(Protocol):
    """One way to train: from random weights, fine-tuning, or reinforcement learning. Its methods are called in this order."""

    plan: RunPlan
    metadata: dict[str, Any]  # the stage's own entries of run.json; valid after `load_weights`
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]  # ids that end a completion
    sampling: Mapping[str, Any] = {}  # recommended for the trained model
    trainable: Any = None  # the parameters that steps change, as loaded; None where they begin random
    frozen: Any  # those beside them, as steps read them; valid after `load_weights`
    frozen_as_loaded: Any = None  # those that a checkpoint holds beside them
    objective: Objective = NEXT_TOKEN
    advice: str  # the end of "Lower --learning-rate ...", for updates that are not finite
    lines_stay: bool = False  # whether every few seconds a line stays on a terminal

    # Valid after `prepare_steps`.
    evaluator: Evaluator | None = None
    buffer_bytes: int = 0  # a step's temporary buffer, which must not be held twice; 0 where that does not matter
    exhausted: bool = False  # whether there is nothing more to learn, which ends the loop
    trained_batch: Any = None  # that of the last step's first update; None where it made none

    def load_weights(self) -> None:
        """Sets `trainable`, `frozen_as_loaded` and `metadata`. Raises UserError when memory is too small."""

    def place(self) -> None:
        """Spreads what was loaded over the mesh, if there is one."""
        return

    def plan_rows(self) -> list[tuple[str, str]]:
        """Returns the banner's rows between device and folder."""

    def print_example(self) -> None:
        """Prints an example of the data below the banner, if the stage has any."""
        return

    def begin_compiling(self, beside_reading: bool) -> None:
        """Begins to compile the step, where that needs no state. `beside_reading`: whether a checkpoint is read next."""
        return

    def initial_state(self, trainable: Any) -> TrainState:
        """Returns the state before the first step, of `trainable`; can be traced."""

    def to_saved(self, trainable: Any) -> Any:
        """Returns the params of a checkpoint."""
        return trainable

    def from_saved(self, params: Any) -> Any:
        """Returns the trainable parameters among those of a checkpoint."""
        return params

    def measure(self, trainable: Any) -> Any:
        """Measures the model, if the stage compares it before and after training."""
        return None

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> None:
        """Compiles the step of the loop."""

    def step(self, state: TrainState, loop_state: LoopState) -> tuple[TrainState, list[bool]]:
        """Runs a step: a batch through a compiled program, or a round of rollouts and updates.

        Returns the next state, which may take `state`'s memory, and for each update whether it was refused.
        """

    def metrics(self, loop_state: LoopState, step_seconds: float) -> dict[str, float]:
        """Returns the fields of a line of metrics.jsonl."""

    def fields(self, loop_state: LoopState, step_seconds: float) -> list[str]:
        """Returns this stage's own fields of the live line."""

    def prompt(self) -> tuple[str, list[int]]:
        """Returns a prompt, as text and as tokens, that shows what the model has learned; only a recording asks for it."""

    def finish(self, state: TrainState, loop_state: LoopState, warm_rate: float | None, before: Any) -> RunReport:
        """Measures at the end, saves what no checkpoint holds, and returns the report.

        `warm_rate`: steps a second after the first, if there were any; `before`: what `measure` returned before training.
        """


class MeshBatches:
    """Batches by step over the mesh of `jax.set_mesh`: each process reads its own rows, by `read(step, rows)`, alone."""

    def __init__(self, order: EpochOrder, read: Callable[[int, slice], Any]) -> None:
        self.read, self.epoch = read, order.epoch
        shares, share = batch_share(order.batch)
        rows = order.batch // shares
        self.rows = slice(share * rows, (share + 1) * rows)

    def at(self, step: int) -> Any:
        return global_batch(self.read(step, self.rows))


def compile_step(
    plan: RunPlan,
    state: TrainState,
    frozen: Any,
    batch: Any,
    objective: Objective = NEXT_TOKEN,
    on_traced: Callable[[], None] = lambda: None,
) -> Compiled:
    """Compiles `train_step` to (state, frozen, batch, progress) -> (state, metrics); the arguments may be shapes.

    Calls `on_traced` before XLA begins.
    """
    tx, microbatches = make_optimizer(plan.recipe.optimizer), plan.recipe.accumulate
    lowered = train_step.lower(
        plan.cfg, tx, state, frozen, batch, np.float32(0), microbatches=microbatches, objective=objective
    )
    on_traced()
    return lowered.compile(plan.compiler_options)


def temporary_bytes(compiled: Compiled) -> int:
    """Returns the bytes of a step's temporary buffer in the host's memory, 0 for a small one."""
    analysis = compiled.memory_analysis() if jax.default_backend() == "cpu" else None
    return size if analysis and (size := analysis.temp_size_in_bytes) >= LARGE_BUFFER else 0


class BatchStage(Stage):
    """A Stage whose step runs a program on one batch after another. `peak_flops`: this machine's, a second."""

    peak_flops: float

    def begin_steps(self, program: Compiled, buffer_bytes: int, batches: MeshBatches, evaluator: Evaluator, step: int) -> None:
        """Sets the program, (state, frozen, batch, progress) -> (state, metrics), its `temporary_bytes`, and the data to read
        from `step` on.
        """
        self.program, self.mesh_batches, self.evaluator = program, batches, evaluator
        self.buffer_bytes = buffer_bytes
        self.schedule = jax.jit(make_schedule(self.plan.recipe.optimizer))
        self.next_batch = batches.at(step)
        self.losses: list[float] = []
        self.loss = self.grad_norm = float("nan")

    def step(self, state: TrainState, loop_state: LoopState) -> tuple[TrainState, list[bool]]:
        step, progress = loop_state.step, np.float32(self.plan.progress(loop_state.step, loop_state.seconds))
        # Memory allocated during a step ends up above its buffer and fragments the heap: make the batch before it.
        following = self.mesh_batches.at(step + 1) if self.buffer_bytes else None
        make_room(self.buffer_bytes)  # the last step's, in whose place a save's buffers may lie
        state, metrics = self.program(state, self.frozen, self.next_batch, progress)
        self.trained_batch = self.next_batch
        self.next_batch = following or self.mesh_batches.at(step + 1)
        # Wait before the next dispatch: two steps in flight would take twice the memory.
        metrics = jax.device_get(metrics)
        self.loss, self.grad_norm = float(metrics.loss), float(metrics.grad_norm)
        self.losses.append(self.loss)
        return state, [bool(metrics.refused)]

    def metrics(self, loop_state: LoopState, step_seconds: float) -> dict[str, float]:
        loss = sum(self.losses) / len(self.losses)  # the mean since the last line
        self.losses = []
        return {
            "loss": loss,
            "grad_norm": self.grad_norm,
            "learning_rate_factor": self._factor(loop_state),
            "tokens_per_second": self.plan.step_tokens / step_seconds,
            "refused": loop_state.refused,
        }

    def fields(self, loop_state: LoopState, step_seconds: float) -> list[str]:
        plan, epoch = self.plan, self.mesh_batches.epoch(loop_state.step)
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

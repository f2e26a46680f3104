"""The interface of the two implementations of training: `jax_trainer.JaxTrainer` and `numpy_trainer.NumPyTrainer`."""

from typing import Any, Protocol

from engine.counting.hardware import Ceilings
from engine.model.config import ModelConfig
from engine.text.batch import Batch
from engine.training.step import TrainState
from stages.cli.console import Console
from stages.runs.estimate import RunPlan
from stages.runs.training_steps import Program


class Trainer(Protocol):
    """Trains from random weights."""

    expected_mfu: float  # of a step's products
    advice: str  # after refused steps
    optimizer_name: str  # run.json's
    memory: int  # bytes of a step, predicted
    memory_note: str  # that follows them in the plan
    buffer_bytes: int = 0  # of the program that was made: see TrainingSteps

    def check_memory(self) -> None:
        """Raises UserError when the model cannot be trained in the memory there is."""

    def step_seconds(self, plan: RunPlan, best: Ceilings) -> float:
        """Predicts the seconds of a step of a plan, this trainer's own or another."""

    def initial_state(self) -> TrainState:
        """Returns the state before the first step."""

    def begin_compiling(self, batch: Any, beside_reading: bool) -> None:
        """Begins to compile a step for batches of these shapes, beside what makes or reads the first state."""
        return

    def make_program(self, console: Console) -> Program:
        """Returns the step, when it is compiled."""

    @staticmethod
    def nats(cfg: ModelConfig, params: Any, batch: Batch) -> Any:
        """Returns the summed nats of the batch's targets."""

    def sample(self, params: Any, max_tokens: int) -> str:
        """Returns a text that the model writes."""

    def remarks(self, params: Any) -> list[tuple[str, str]]:
        """Returns more rows for the summary, or none."""

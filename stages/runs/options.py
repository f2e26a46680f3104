"""RunOptions: where and how a run is carried out, whatever its stage."""

import dataclasses
from pathlib import Path

from engine.device import Device
from engine.mesh.shape import MeshShape
from stages.runs.flags import FolderFlags
from stages.runs.plan import RunPlan
from stages.runs.stage import LoopState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(FolderFlags):
    """Where and how a run is carried out. Intervals are steps (int) or seconds (float)."""

    stage: str  # the command's name
    device: Device
    folder: Path
    dry_run: bool
    # None: by `evaluations`; without these a tenth of the run, or more where evaluating takes too
    # much of the time.
    eval_every: int | float | None = None
    evaluations: int | None = None  # evenly over the run
    patience: int | None = None  # evaluations in a row without a best that end the run
    mesh: MeshShape | None = None

    @property
    def shows_weights(self) -> bool:
        return self.record is not None or self.watch is not None

    def is_over(self, plan: RunPlan, loop_state: LoopState) -> bool:
        out_of_patience = self.patience is not None and loop_state.since_best >= self.patience
        return out_of_patience or plan.progress(loop_state.step, loop_state.seconds) >= 1

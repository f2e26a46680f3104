"""Reports the progress of a run: its live line, metrics.jsonl, and how long it will take."""

import collections
from typing import TYPE_CHECKING, Any

from engine.counting.hardware import peak_rss_bytes
from engine.device import Device
from engine.format import clock_time, duration, format_bytes, quantity
from engine.mesh import processes
from engine.processor import CoreTime, core_time
from stages.cli.console import Console
from stages.runs.folder import JsonLines
from stages.runs.options import RunOptions
from stages.runs.plan import RunPlan
from stages.runs.stage import LoopState, StepResult, Steps
from stages.runs.stop import Stop

if TYPE_CHECKING:  # a run that nobody watches or records does without
    from stages.runs.watch.recorder import Recorder

RECENT = 20  # steps over which speed is averaged
# The run's time is predicted after more than these seconds and steps: the first steps say little of it.
PREDICTS_AFTER_SECONDS = 5.0
PREDICTS_AFTER_STEPS = 5
LINE_INTERVAL = 5.0  # seconds between lines that stay on a terminal
BUSY = 0.1  # share of the cores that others take, above which a run says so


class StepTimer:
    """Measures the mean time of recent steps, and the rate of all steps but the first.

    The first step is slower than the others: it touches its memory for the first time.
    """

    def __init__(self) -> None:
        self.recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self.count = 0
        self.warm_seconds = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count == 2:
            self.recent.clear()
        if self.count > 1:
            self.warm_seconds += seconds
        self.recent.append(seconds)

    def mean(self) -> float:
        return max(sum(self.recent) / max(len(self.recent), 1), 1e-9)

    def warm_rate(self) -> float | None:
        """Returns the steps a second after the first, if there were any."""
        if self.count < 2:
            return None
        return (self.count - 1) / self.warm_seconds


class ProgressLog:
    """Reports the progress of a loop: its `loop_state`, which the loop changes, and the metrics of
    its steps."""

    def __init__(
        self,
        options: RunOptions,
        plan: RunPlan,
        steps: Steps,
        console: Console,
        recorder: "Recorder | None",
        stop: Stop,
        loop_state: LoopState,
    ) -> None:
        self.options = options
        self.plan = plan
        self.steps = steps
        self.console = console
        self.recorder = recorder
        self.stop = stop
        self.loop_state = loop_state
        self.timer = StepTimer()
        self.started = core_time()
        self.lines = JsonLines(options.folder / "metrics.jsonl", loop_state.step)
        self.logged_step = loop_state.step
        self.metrics: list[Any] = []  # of the steps since the last line
        self.latest: Any = None  # metrics of the last step
        self.validations = 0  # calls of `report_validation`

    def report_step(self, result: StepResult, is_done: bool) -> None:
        loop_state = self.loop_state
        self.latest = result.metrics
        self.metrics.append(result.metrics)
        is_predictable = (
            self.timer.warm_seconds > PREDICTS_AFTER_SECONDS and self.timer.count > PREDICTS_AFTER_STEPS
        )
        if loop_state.predicted is None and is_predictable:
            self._predict()
        is_due = loop_state.is_due("line", LINE_INTERVAL) or self.timer.count == 1 or is_done
        is_permanent = self.steps.lines_stay and is_due
        if is_permanent:
            loop_state.begin("line")
        self.show(important=is_permanent)
        if any(result.refused):
            self.write({"refused_batch": loop_state.refused_batch})
        if loop_state.is_due("log", self.options.log_every):
            loop_state.begin("log")
            self.write_step()

    def write_step(self) -> None:
        """Writes a line with the metrics of the steps since the last one."""
        self.logged_step = self.loop_state.step
        fields = self.steps.log_fields(self.metrics, self.loop_state, self.timer.mean())
        self.metrics = []
        self.write(fields)

    def report_validation(self, fields: dict[str, float]) -> None:
        self.validations += 1
        self.write(fields, "validation")
        self.show(important=True)

    def write(self, fields: dict[str, Any], event: str = "step") -> None:
        line = {"step": self.loop_state.step, "seconds": self.loop_state.seconds, **fields}
        with self.stop.noting_failure():
            self.lines.add(**line)
        if self.recorder:
            self.recorder.event(event, **line)

    def show(self, important: bool) -> None:
        with self.stop.noting_failure():
            self.console.show_live(self._live_line, important)

    def busy_note(self) -> str:
        return busy_note(self.started, self.options.device)

    def _predict(self) -> None:
        now = self.loop_state
        step_seconds = 1 / (self.timer.warm_rate() or 1)
        left = self.plan.seconds_left(now.step, now.seconds, step_seconds)
        steps = now.step + round(left / step_seconds)
        seconds = now.seconds + left
        now.predicted = (steps, seconds)
        predicted = f"{quantity(steps, self.plan.step_name)} in {duration(seconds)}"
        with self.stop.noting_failure():
            self.console.print_rows(
                [("predicted", f"{predicted}, as the first {now.step:,} went{self.busy_note()}")]
            )

    def _live_line(self) -> list[str]:
        plan = self.plan
        now = self.loop_state
        step_seconds = self.timer.mean()
        left = plan.seconds_left(now.step, now.seconds, step_seconds)
        done = f"{plan.step_name} {now.step:,}"
        if plan.steps:
            done += f"/{plan.steps:,}"
        line = [done, *self.steps.live_fields(self.latest, now, step_seconds)]
        if self.steps.evaluator and now.validation is None:
            line.append("val -")
        elif self.steps.evaluator:
            line.append(f"val {now.validation:.3f} {self.steps.evaluator.unit}")
        line.append(format_bytes(peak_rss_bytes()))
        line.append(f"{clock_time(now.seconds)} done, {clock_time(left)} left")
        if now.refused:
            line.append(f"{quantity(now.refused, 'step')} refused, last batch {now.refused_batch}")
        return line


def busy_note(begin: CoreTime | None, device: Device) -> str:
    """Returns a phrase with the share of the cores that others have had since `begin`.

    It is empty for BUSY or less, for a run on other devices than a CPU, and for one of several
    processes.
    """
    now = core_time()
    if begin is None or now is None or device.backend != "cpu" or processes.process_count() > 1:
        return ""
    share = (now.others - begin.others) / max(now.total - begin.total, 1.0)
    if share <= BUSY:
        return ""
    return f"; this machine is busy: others took {share:.0%} of its cores"

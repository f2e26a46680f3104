"""Rewards completions by rules, and by functions in the user's own file, each with a weight."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.training.reinforce import TASKS, Reward, make_reward

RULE_SECONDS = 2.0  # of a rule, for a round
MAX_WEIGHT = 1e6
PROCESS = Path(__file__).with_name("own_function.py")


class Rewards:
    """Sums the rewards of tasks, each `[WEIGHT*]TASK`: one of TASKS, or FILE.py:FUNCTION, which has `seconds` for a call.

    `remedy`: what to do about one that takes longer. Raises UserError for what is none, a weight that is
    not above 0 or is beyond MAX_WEIGHT, and a file that cannot be run.
    """

    def __init__(self, tasks: Sequence[str], seconds: float, remedy: str = "mend it") -> None:
        self.name, self.seconds, self.remedy, self.names = " ".join(tasks), seconds, remedy, set[str]()
        self._rules, self._functions = list[tuple[float, Reward]](), list[tuple[float, str, str]]()
        for text in tasks:
            weight, task = re.fullmatch(r"(?:(-?\d*\.?\d+)\*)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
            if weight and not 0 < float(weight) <= MAX_WEIGHT:
                wanted = f"above 0 and at most {MAX_WEIGHT:,.0f}"
                raise UserError(f"The weight of the task {task!r} should be {wanted}, not {weight[:40]}.")
            if own := re.fullmatch(r"(.+\.py):(\w+)", task):
                file = str(Path(own[1]).expanduser())
                if not Path(file).is_file():
                    raise UserError(f"There is no file {file}; a function of your own is FILE.py:FUNCTION.")
                self._call(file, own[2], [])
                self._functions.append((float(weight or 1), file, own[2]))
            else:
                self._rules.append((float(weight or 1), make_reward(task)))
            self.names.add("own" if own else task.partition(":")[0])

    def describe(self) -> str:
        return "; ".join(
            TASKS[name].partition(", ")[2] if name in TASKS else "by your own function" for name in sorted(self.names)
        )

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[Any]) -> list[float]:
        """Returns the reward of each completion. Raises UserError for a rule or a function that fails or takes too long."""
        totals = [0.0] * len(completions)
        with _time_limit("The task's pattern takes too long on an answer: write it so that it has one way to match a text."):
            for weight, rule in self._rules:
                totals = [total + weight * rule(*row) for total, *row in zip(totals, completions, answers)]
        rows = [dict(zip(("prompt", "completion", "answer"), row)) for row in zip(prompts, completions, answers)]
        for weight, file, function in self._functions:
            totals = [total + weight * value for total, value in zip(totals, self._call(file, function, rows))]
        return totals

    def _call(self, file: str, function: str, rows: list[dict[str, Any]]) -> list[float]:
        """Calls a user's function in a process that ends with it: it can neither stop this one nor change anything in it."""
        command = [sys.executable, "-P", "-B", str(PROCESS), file, function, str(self.seconds)]
        try:
            done = subprocess.run(
                command, input=json.dumps(rows), stdout=subprocess.PIPE, text=True, timeout=self.seconds, start_new_session=True
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{file}: {function} did not return within {self.seconds:g} s, for {len(rows)} completions: {self.remedy}."
            ) from None
        try:
            reply = json.loads(done.stdout)
        except ValueError:
            raise UserError(f"{file}: {function} ended its process (exit code {done.returncode}) without a result.") from None
        if "error" in reply:
            raise UserError(reply["error"])
        return reply["values"]


@contextlib.contextmanager
def _time_limit(sentence: str) -> Iterator[None]:
    """Raises UserError(sentence) after RULE_SECONDS in the block. To be called in the main thread, to which signals come."""

    def ring(number: int, frame: object) -> None:
        raise UserError(f"{sentence} ({RULE_SECONDS:g} s were not enough.)")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, RULE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

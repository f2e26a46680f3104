"""Rewards completions by rules, and by functions in the user's own file, each with a weight."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.training.reinforce import TASKS, Reward, make_reward

RULE_SECONDS = 2.0  # of a rule, for a round
MAX_WEIGHT = 1e6
PROCESS = Path(__file__).with_name("own_function.py")
Cases = list[dict[str, Any]]  # a prompt, completion and answer each


class Rewards:
    """Sums the rewards of tasks, each `[WEIGHT*]TASK`: one of TASKS, or FILE.py:FUNCTION, which has
    `seconds` for a call.

    `remedy`: what to do about a function that takes longer. Raises UserError for an unknown task, a
    weight that is not above 0 or is beyond MAX_WEIGHT, and a file that cannot be run.
    """

    def __init__(self, tasks: Sequence[str], seconds: float, remedy: str = "mend it") -> None:
        self.name = " ".join(tasks)
        self.seconds = seconds
        self.remedy = remedy
        self.names: set[str] = set()  # of rules, "own" for a function
        self._tasks: list[tuple[float, Callable[[Cases], list[float]]]] = []  # weight and reward
        for text in tasks:
            weight, task = _split_weight(text)
            self._tasks.append((weight, self._make_reward(task)))

    def _make_reward(self, task: str) -> Callable[[Cases], list[float]]:
        """Returns the rewards of rows by a task, and notes its name."""
        own = re.fullmatch(r"(.+\.py):(\w+)", task)
        if not own:
            reward = make_reward(task)
            self.names.add(task.partition(":")[0])
            return functools.partial(_by_rule, reward)
        path, function = own.groups()
        file = str(Path(path).expanduser())
        if not Path(file).is_file():
            raise UserError(f"There is no file {file}; a function of your own is FILE.py:FUNCTION.")
        self._call(file, function, [])  # raises for a file that cannot be run
        self.names.add("own")
        return functools.partial(self._call, file, function)

    def describe(self) -> str:
        phrases = []
        for name in sorted(self.names):
            if name in TASKS:
                _, _, phrase = TASKS[name].partition(", ")
            else:
                phrase = "by your own function"
            phrases.append(phrase)
        return "; ".join(phrases)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[Any]
    ) -> list[float]:
        """Returns the reward of each completion. Raises UserError for a rule or a function that
        fails or takes too long."""
        rows = []
        for prompt, completion, answer in zip(prompts, completions, answers):
            rows.append({"prompt": prompt, "completion": completion, "answer": answer})
        sums = [0.0] * len(rows)
        for weight, reward in self._tasks:
            for row, value in enumerate(reward(rows)):
                sums[row] += weight * value
        return sums

    def _call(self, file: str, function: str, rows: Cases) -> list[float]:
        """Calls a user's function in a process that ends with it: it can neither stop this one nor
        change anything in it.

        Processes that the function starts, and that stay in its session, end with it.
        """
        command = [sys.executable, "-P", "-B", str(PROCESS), file, function, str(self.seconds)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
            try:
                output, _ = process.communicate(json.dumps(rows), self.seconds)
                reply = json.loads(output)
            except BaseException as error:
                # of a group that has ended
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # what the function has started too
                if isinstance(error, subprocess.TimeoutExpired):
                    late = f"did not return within {self.seconds:g} s, for {len(rows)} completions: {self.remedy}"
                    raise UserError(f"{file}: {function} {late}.") from None
                if isinstance(error, ValueError):
                    ended = f"ended its process (exit code {process.returncode}) without a result"
                    raise UserError(f"{file}: {function} {ended}.") from None
                raise
        if "error" in reply:
            raise UserError(reply["error"])
        return reply["values"]


def _split_weight(text: str) -> tuple[float, str]:
    """Splits `[WEIGHT*]TASK` into the weight, 1 where there is none, and the task.

    Raises UserError for a weight that is not above 0 or is beyond MAX_WEIGHT.
    """
    match = re.fullmatch(r"(?:(-?\d*\.?\d+)\*)?(.*)", text, re.DOTALL)
    assert match  # as every text does
    weight, task = match.groups()
    if weight is None:
        return 1.0, task
    if not 0 < float(weight) <= MAX_WEIGHT:
        wanted = f"above 0 and at most {MAX_WEIGHT:,.0f}"
        raise UserError(f"The weight of the task {task!r} should be {wanted}, not {weight[:40]}.")
    return float(weight), task


def _by_rule(reward: Reward, rows: Cases) -> list[float]:
    """Raises UserError after RULE_SECONDS. To be called in the main thread, to which signals come."""

    def ring(number: int, frame: object) -> None:
        raise UserError(
            "The task's pattern takes too long on an answer: "
            f"write it so that it has one way to match a text. ({RULE_SECONDS:g} s were not enough.)"
        )

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, RULE_SECONDS)
    try:
        return [reward(row["completion"], row["answer"]) for row in rows]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

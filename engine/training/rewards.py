"""Rewards that a rule can verify: what an answer is worth, from its text alone.

    reward = make_reward("length:12")
    reward("The sea is wide and cold.", None)      # 0.5: six words of twelve

No second model judges, so nothing can be talked round; but what the rule does not ask for is not learnt either.
"""

import re
from collections.abc import Callable
from typing import Any

from engine.errors import UserError, nearest

Reward = Callable[[str, int | None], float]  # (answer, the right number where there is one) -> from 0 to 1

TASKS = {
    "length": "length:N, an answer of N words",
    "regex": "regex:PATTERN, an answer in which the pattern is found",
    "sum": "sum, an answer that ends with the right number",
}
LONGEST = 4000  # characters of an answer in which a pattern is looked for


def make_reward(task: str) -> Reward:
    """The reward that `length:12`, `regex:PATTERN` or `sum` names. Raises UserError for anything else."""
    name, _, rest = task.partition(":")
    if name == "length" and rest.isdecimal() and 1 <= int(rest) <= 1000:
        return length_reward(int(rest))
    if name == "regex" and rest:
        return regex_reward(rest)
    if task == "sum":
        return sum_reward
    if name in TASKS:
        raise UserError(f"The task {task!r} should be {TASKS[name]}{' from 1 to 1000' if name == 'length' else ''}.")
    raise UserError(f"There is no task {task!r}; there are {'; '.join(TASKS.values())}.{nearest(name, [*TASKS])}")


def length_reward(words: int) -> Reward:
    """1 for an answer of that many words, and the ratio of the two counts for others: half for twice as many.

    A word is what stands between two spaces.
    """

    def reward(answer: str, _: Any) -> float:
        found = len(answer.split())
        return min(found, words) / max(found, words)

    return reward


def regex_reward(pattern: str) -> Reward:
    """1 where the pattern is found in the first LONGEST characters of an answer, else 0; `^...$` asks for the whole of it.

    Python's `re` may take exponentially long over a pattern such as `(a+)+$`: who takes patterns from others must bound
    its time. Raises UserError for what is no pattern.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}.") from error
    return lambda answer, _: float(compiled.search(answer[:LONGEST]) is not None)


def sum_reward(answer: str, right: int | None) -> float:
    """1 where the last integer in an answer is the right one, else 0. Commas between thousands are read over."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", answer[-LONGEST:])
    found = re.findall(r"(?:(?<!\w)-)?\d+", text)  # a dash behind a word or a number is no sign
    return float(bool(found) and right is not None and int(found[-1]) == right)

"""Rewards that a rule computes from a completion's text alone.

reward = make_reward("length:12")
reward("The sea is wide and cold.", None)      # 0.5: six words of twelve
"""

import re
from collections.abc import Callable

from engine.errors import UserError, did_you_mean

Reward = Callable[[str, int | None], float]  # (completion, right number or None) -> 0 to 1

TASKS = {
    "length": "length:N, an answer of N words",
    "regex": "regex:PATTERN, an answer in which the pattern is found",
    "sum": "sum, an answer that ends with the right number",
    "yes-no": "yes-no, an answer that begins with Yes or No",
}
LONGEST = 4000  # characters of a completion that a pattern is searched in


def make_reward(task: str) -> Reward:
    """Makes the reward of `length:12`, `regex:PATTERN`, `sum` or `yes-no`. Raises UserError for anything else."""
    name, _, rest = task.partition(":")
    if name == "length" and rest.isdecimal() and 1 <= int(rest) <= 1000:
        return length_reward(int(rest))
    if name == "regex" and rest:
        return regex_reward(rest)
    if task == "sum":
        return sum_reward
    if task == "yes-no":
        return regex_reward(r"^(Yes|No)\b")
    if name in TASKS:
        raise UserError(f"The task {task!r} should be {TASKS[name]}{' from 1 to 1000' if name == 'length' else ''}.")
    raise UserError(f"There is no task {task!r}; there are {'; '.join(TASKS.values())}.{did_you_mean(name, [*TASKS])}")


def length_reward(words: int) -> Reward:
    """Rewards a completion of that many words with 1, another with the ratio of the counts. A word has no white space."""

    def reward(completion: str, _: int | None) -> float:
        count = len(completion.split())
        return min(count, words) / max(count, words)

    return reward


def regex_reward(pattern: str) -> Reward:
    """Rewards a completion with 1 if the pattern is found in its first LONGEST characters; `^...$` asks for all of it.

    A pattern such as `(a+)+$` may take exponentially long: bound its time if patterns come from others. Raises UserError
    for what is no pattern.
    """
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}.") from error
    return lambda completion, _: float(expression.search(completion[:LONGEST]) is not None)


def sum_reward(completion: str, right: int | None) -> float:
    """Rewards a completion with 1 if its last integer is the right one, else 0. Commas between thousands are skipped."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", completion[-LONGEST:])
    integers = re.findall(r"(?:(?<!\w)-)?\d+", text)  # a dash after a word or a number is no sign
    return float(bool(integers) and right is not None and int(integers[-1]) == right)

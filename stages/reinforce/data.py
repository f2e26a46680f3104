"""Prompts for reinforcement learning: those that come with a task, or those of a file."""

import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from engine.text.corpus import normalize
from engine.text.jsonl import json_type, read_rows

THINGS = (
    "rain", "the sea", "a tree", "a river", "snow", "a horse", "bread", "the moon", "a bridge", "sleep", "a city", "salt",
    "wind", "a book", "a cat", "music", "fire", "a ship", "glass", "winter", "a garden", "iron", "a clock", "tea",
    "a map", "stone", "the sun", "a school", "wool", "thunder", "a hill", "milk", "a lamp", "ice", "a song", "dust",
)  # fmt: skip
QUESTIONS = ("What is {}?", "Describe {}.", "Why do we need {}?", "Tell me of {}.")
YES_NO_QUESTIONS = tuple(
    f"{text} Answer with yes or no." for text in ("Is {} alive?", "Can I buy {}?", "Is {} older than I am?", "Can I hold {}?")
)
HELD_OUT = 4  # one prompt of so many is never trained on
SUMS = 400


class Prompt(NamedTuple):
    """A user's message, and the right answer where there is one."""

    text: str
    answer: int | None = None


class Prompts(NamedTuple):
    """Training prompts, held-out prompts, and what they are called."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    name: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()


def prompts_for(task: str, data: Path | None, seed: int) -> Prompts:
    """Returns the prompts of a file, or those that come with the task, in an order that follows from the seed.

    Raises UserError, with file and line, for a row without a prompt or, for the task `sum`, without an answer.
    """
    if data:
        rows = _read(data, task)
        prompts = [*{normalize(prompt.text): prompt for prompt in reversed(rows)}.values()][::-1]  # the first of each
        copies = len(rows) - len(prompts)
        name = f"{data}" + f" ({copies:,} copies left out)" * (copies > 0)
    elif task == "sum":
        pairs = random.Random(seed).choices([(a, b) for a in range(10) for b in range(10)], k=SUMS)
        prompts, name = [Prompt(f"What is {a} + {b}?", a + b) for a, b in dict.fromkeys(pairs)], "sums of two digits"
    else:
        yes_no = task == "yes-no"
        prompts = [Prompt(text.format(thing)) for text in (YES_NO_QUESTIONS if yes_no else QUESTIONS) for thing in THINGS]
        name = f"{len(prompts)} short questions{' of yes or no' * yes_no}"
    if len(prompts) < 2:
        raise UserError(f"{name} has {len(prompts)} prompts, too few to hold any out; at least 2 are needed.")
    random.Random(seed).shuffle(prompts)
    held_out = max(1, len(prompts) // HELD_OUT)
    return Prompts(tuple(prompts[held_out:]), tuple(prompts[:held_out]), name)


def _read(path: Path, task: str) -> list[Prompt]:
    if not path.is_file():
        raise UserError(f'There is no file {path}; --data takes a .jsonl of {{"prompt": "...", "answer": 7}}.')
    prompts = []
    for row, where in read_rows(path):
        prompt, answer = row.get("prompt"), row.get("answer")
        if not isinstance(prompt, str) or not prompt.strip():
            problem = "is missing or empty" if isinstance(row.get("prompt", ""), str) else f"is {json_type(prompt)}"
            raise UserError(f"{where}: `prompt` should be text and {problem}.")
        if task == "sum" and (not isinstance(answer, int) or isinstance(answer, bool)):
            problem = f"is {json_type(answer)}" if "answer" in row else "is missing"
            raise UserError(f"{where}: `answer` should be an integer and {problem}.")
        prompts.append(Prompt(prompt, answer if task == "sum" else None))
    return prompts

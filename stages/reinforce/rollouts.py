"""Rollouts: a task's prompts, their completions, the rewards of these, and their log-probabilities."""

import hashlib
import itertools
import json
import math
import operator
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.corpus import normalize
from engine.text.packing import example_rows
from engine.text.rows import check_text, json_type, read_rows
from engine.training.reinforce import log_probabilities

THINGS = (
    "rain",
    "the sea",
    "a tree",
    "a river",
    "snow",
    "a horse",
    "bread",
    "the moon",
    "a bridge",
    "sleep",
    "a city",
    "salt",
    "wind",
    "a book",
    "a cat",
    "music",
    "fire",
    "a ship",
    "glass",
    "winter",
    "a garden",
    "iron",
    "a clock",
    "tea",
    "a map",
    "stone",
    "the sun",
    "a school",
    "wool",
    "thunder",
    "a hill",
    "milk",
    "a lamp",
    "ice",
    "a song",
    "dust",
)
QUESTIONS = ("What is {}?", "Describe {}.", "Why do we need {}?", "Tell me of {}.")
YES_NO_QUESTIONS = tuple(
    f"{text} Answer with yes or no."
    for text in ("Is {} alive?", "Can I buy {}?", "Is {} older than I am?", "Can I hold {}?")
)
HELD_OUT = 4  # one prompt of so many is never trained on
SUMS = 400


class Prompt(NamedTuple):
    """A user's message, and the right answer where there is one: an integer, or for functions of
    one's own any JSON."""

    text: str
    answer: Any = None


class Prompts(NamedTuple):
    """Training prompts, held-out prompts, and what they are called."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    name: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()


def prompts_for(tasks: set[str], data: Path | None, seed: int) -> Prompts:
    """Returns the prompts of a file, or those that come with the tasks, in an order that follows
    from the seed.

    `tasks`: their names. Raises UserError, with file and line, for a row without a prompt or
    without the answer that `sum` or `exact` needs.
    """
    if data:
        prompts, name = _prompts_of_file(data, tasks)
    else:
        prompts, name = _prompts_of_tasks(tasks, seed)
    if len(prompts) < 2:
        raise UserError(f"{name} has {len(prompts)} prompts, too few to hold any out; at least 2 are needed.")
    random.Random(seed).shuffle(prompts)
    held_out = max(1, len(prompts) // HELD_OUT)
    return Prompts(train=tuple(prompts[held_out:]), held_out=tuple(prompts[:held_out]), name=name)


def _prompts_of_file(data: Path, tasks: set[str]) -> tuple[list[Prompt], str]:
    """Returns the prompts of a file without copies, and its name with how many those were."""
    rows = _read(data, tasks)
    prompts = _without_copies(rows)
    copies = len(rows) - len(prompts)
    if copies:
        return prompts, f"{data} ({copies:,} copies left out)"
    return prompts, f"{data}"


def _prompts_of_tasks(tasks: set[str], seed: int) -> tuple[list[Prompt], str]:
    """Returns the prompts that come with the tasks, and what they are called."""
    if "exact" in tasks:
        raise UserError("The task exact needs --data with an `answer` to each prompt.")
    if "sum" in tasks:
        pairs = random.Random(seed).choices([*itertools.product(range(10), range(10))], k=SUMS)
        different_pairs = dict.fromkeys(pairs)
        return [Prompt(f"What is {a} + {b}?", a + b) for a, b in different_pairs], "sums of two digits"
    if "yes-no" in tasks:
        prompts = _ask_about_things(YES_NO_QUESTIONS)
        return prompts, f"{len(prompts)} short questions of yes or no"
    prompts = _ask_about_things(QUESTIONS)
    return prompts, f"{len(prompts)} short questions"


def _without_copies(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Leaves out copies: of prompts that are the same but for case, spaces and punctuation the first
    one stays, at the position of the last."""
    firsts: dict[str, Prompt] = {}
    for prompt in reversed(prompts):
        firsts[normalize(prompt.text)] = prompt
    return [*firsts.values()][::-1]


def _ask_about_things(questions: Sequence[str]) -> list[Prompt]:
    prompts = []
    for question in questions:
        prompts += [Prompt(question.format(thing)) for thing in THINGS]
    return prompts


def _read(path: Path, tasks: set[str]) -> list[Prompt]:
    if not path.is_file():
        raise UserError(
            f'There is no file {path}; --data takes a .jsonl of {{"prompt": "...", "answer": 7}}.'
        )
    prompts = []
    for row, where in read_rows(path):
        prompt = check_text(row.get("prompt", ""), "prompt", where)
        if not prompt.strip():
            raise UserError(f"{where}: `prompt` is missing or empty.")
        if "sum" in tasks:
            _check_answer(row, int, "an integer", where)
        if "exact" in tasks:
            _check_answer(row, str, "text", where)
        answer = None
        if tasks & {"sum", "exact", "own"}:
            answer = row.get("answer")
        prompts.append(Prompt(prompt, answer))
    return prompts


def _check_answer(row: Mapping[str, Any], kind: type, description: str, where: str) -> None:
    """Raises UserError unless a row's answer is of the kind, which True is never."""
    if "answer" not in row:
        raise UserError(f"{where}: `answer` is missing.")
    answer = row["answer"]
    if not isinstance(answer, kind) or isinstance(answer, bool):
        raise UserError(f"{where}: `answer` should be {description}, not {json_type(answer)}.")


class BitsPerByte(NamedTuple):
    """How a model compresses completions."""

    of_each: np.ndarray  # (B,)
    of_all: float


class Rollout(NamedTuple):
    """B completions of prompts and their rewards."""

    batch: Batch  # its mask counts a completion's tokens, that which ends it too
    texts: list[str]
    text_bytes: list[int]  # of the completion's tokens, that which ends it too
    rewards: list[float]
    seconds: float  # of inference

    @property
    def tokens(self) -> int:
        return int(self.batch.mask.sum())

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    def bits_per_byte(self, logprobs: np.ndarray) -> BitsPerByte:
        """Returns the bits per byte of the completions, by log-probabilities (B, T)."""
        bits = -logprobs.sum(1) / math.log(2)
        sizes = np.array(self.text_bytes)
        return BitsPerByte(
            of_each=bits / np.maximum(sizes, 1), of_all=float(bits.sum() / max(sizes.sum(), 1))
        )


def prompt_tokens(chat: ChatTokenizer, prompt: Prompt) -> list[int]:
    return chat.prompt([{"role": "user", "content": prompt.text}]).tolist()


def rollout_batch(prompts: Sequence[list[int]], completions: Sequence[list[int]], seq: int) -> Batch:
    """Returns a Batch of prompts with their completions, `seq` tokens a row, whose mask counts the
    completions' tokens."""
    examples = []
    for prompt, completion in zip(prompts, completions):
        tokens = np.array(prompt + completion, np.int32)
        is_completion = np.arange(len(tokens)) >= len(prompt)
        examples.append(Example(tokens, is_completion, ""))
    return example_rows(examples, seq)


def score_batch(cfg: ModelConfig, params: Params, batch: Batch, rows: int) -> np.ndarray:
    """Returns the log-probabilities (B, T) of a batch under `params`, `rows` at once; 0 where the
    mask is False."""
    logprobs = []
    for first in range(0, len(batch.tokens), rows):
        part = jax.tree.map(operator.itemgetter(slice(first, first + rows)), batch)
        logprobs.append(np.asarray(log_probabilities(cfg, params, part)))
    return np.concatenate(logprobs)

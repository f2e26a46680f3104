"""The inference half of a round: completions sampled from a model that is only read, and the reward of each."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.inference import decode
from engine.inference.sampling_params import SamplingParams
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.text.chat import Chat, Example
from engine.text.packing import evaluation_batches
from engine.training.rewards import Reward
from stages.reinforce.data import Prompt

PATIENCE = 2.0  # seconds for the rewards of a round


class Completion(NamedTuple):
    """The tokens that were sampled, the one that ended them among them, and whether one did."""

    tokens: list[int]
    ended: bool


class Rollout(NamedTuple):
    """Prompts as tokens, a completion of each, its text, its reward, and how long inference took."""

    prompts: list[list[int]]
    completions: list[Completion]
    texts: list[str]
    rewards: list[float]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens that were sampled."""
        return sum(len(completion.tokens) for completion in self.completions)

    @property
    def mean_reward(self) -> float:
        """The mean reward."""
        return sum(self.rewards) / len(self.rewards)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples completions of at most `max_tokens` and rewards them. Caches have `capacity` places; `ends` end a completion."""

    cfg: ModelConfig
    chat: Chat
    ends: Collection[int]
    reward: Reward
    temperature: float
    max_tokens: int
    capacity: int

    def rollout(self, params: Params, prompts: Sequence[Prompt], seed: int) -> Rollout:
        """Returns a completion of each prompt with its reward. Rows have the seeds seed, seed + 1, ..."""
        tokens = [prompt_tokens(self.chat, prompt) for prompt in prompts]
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, seed=seed).per_row(len(prompts))
        begin = time.perf_counter()
        completions = sample_completions(self.cfg, params, tokens, sampling, ends=self.ends, capacity=self.capacity)
        seconds = time.perf_counter() - begin
        decoded = self.chat.tokenizer.decode
        texts = [decoded(tokens[: len(tokens) - ended]).strip() for tokens, ended in completions]
        rewards = rewards_of(self.reward, texts, [prompt.answer for prompt in prompts])
        return Rollout(tokens, completions, texts, rewards, seconds)


def prompt_tokens(chat: Chat, prompt: Prompt) -> list[int]:
    """Returns the tokens that the model reads of a prompt."""
    return chat.prompt([{"role": "user", "content": prompt.text}]).tolist()


def sample_completions(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    *,
    ends: Collection[int],
    capacity: int,
) -> list[Completion]:
    """Returns a completion of each prompt. Raises UserError as `decode.generate`.

    The end of a completion is a token like any other: it was sampled, and when to end is trained too. So it is kept here,
    where `decode.generate` would leave it out and not say which of several it was.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    ended, running = [False] * len(prompts), set(range(len(prompts)))
    for row, new, finished in decode.generate(cfg, params, prompts, sampling, capacity=capacity):
        if row not in running:
            continue
        for token in new:
            tokens[row].append(token)
            if token in ends:
                ended[row] = True
                break
        if ended[row] or finished:
            running.discard(row)
        if not running:
            break
    return [Completion(*pair) for pair in zip(tokens, ended)]


def rollout_batch(prompts: Sequence[list[int]], completions: Sequence[Completion], seq: int) -> Batch:
    """Returns prompts followed by their completions, a row of `seq` places each, in which the completions' tokens count."""
    examples = []
    for prompt, completion in zip(prompts, completions):
        mask = np.arange(len(prompt) + len(completion.tokens)) >= len(prompt)
        examples.append(Example(np.array([*prompt, *completion.tokens], np.int32), mask, ""))
    return next(evaluation_batches(examples, seq, len(examples), pack=False))


def rewards_of(reward: Reward, texts: Sequence[str], right: Sequence[int | None], patience: float = PATIENCE) -> list[float]:
    """Returns the reward of each text. Raises UserError when that takes longer than `patience` s, as some patterns do."""
    with _within(patience, "The task's pattern takes too long on an answer: write it so that it has one way to match a text."):
        return [reward(text, number) for text, number in zip(texts, right)]


class _Late(BaseException):
    """The alarm rang; nothing in between is to take this for an error of its own."""


@contextlib.contextmanager
def _within(seconds: float, sentence: str) -> Iterator[None]:
    """Raises UserError(sentence) after so many seconds in the block, where signals come: in the main thread."""

    def ring(number: int, frame: object) -> None:
        raise _Late

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Late:
        raise UserError(f"{sentence} ({seconds:g} s were not enough.)") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""The inference half of a round: samples completions, rewards and scores each."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from engine.errors import UserError
from engine.inference.engine import complete
from engine.inference.request import SamplingParams
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.packing import evaluation_batches
from engine.training.reinforce import log_probabilities
from engine.training.rewards import Reward
from stages.reinforce.data import Prompt

REWARD_TIMEOUT = 2.0  # seconds, for a round


class Scores(NamedTuple):
    """The `rollout_batch` of completions, its log-probabilities (B, T) under a model, and each one's bits per byte (B,).

    `bits`: bits per byte of all completions together. Bits include those of the token that ends a completion.
    """

    batch: Batch
    logprobs: np.ndarray
    bits_each: np.ndarray
    bits: float


class Rollout(NamedTuple):
    """The completions of a round's prompts, and their rewards."""

    prompts: list[list[int]]  # tokens
    completions: list[list[int]]  # tokens, the stop token included
    texts: list[str]  # of completions
    text_bytes: list[int]
    rewards: list[float]
    seconds: float  # of inference

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples completions of at most `max_tokens`, and rewards each by `reward(text, right answer or None)`.

    `capacity`: positions of the KV cache. `stop_token_ids` end a completion.
    """

    cfg: ModelConfig
    chat: ChatTokenizer
    stop_token_ids: Collection[int]
    reward: Reward
    temperature: float
    max_tokens: int
    capacity: int

    def rollout(self, params: Params, prompts: Sequence[Prompt], seed: int) -> Rollout:
        """Samples and rewards a completion of each prompt, with seeds seed, seed + 1, ...

        Raises UserError as `complete`, and when the rewards take longer than REWARD_TIMEOUT.
        """
        tokens = [prompt_tokens(self.chat, prompt) for prompt in prompts]
        begin = time.perf_counter()
        sampling = SamplingParams(self.max_tokens, self.temperature, seed=seed, stop_token_ids=self.stop_token_ids)
        rows = complete(self.cfg, params, tokens, sampling.per_row(len(prompts)), self.capacity)
        completions = [row.tokens if row.stop_token is None else [*row.tokens, row.stop_token] for row in rows]
        seconds = time.perf_counter() - begin
        texts = []
        for completion in completions:
            ended = bool(completion) and completion[-1] in self.stop_token_ids
            texts.append(self.chat.tokenizer.decode(completion[: len(completion) - ended]).strip())
        with _time_limit("The task's pattern takes too long on an answer: write it so that it has one way to match a text."):
            rewards = [self.reward(text, prompt.answer) for text, prompt in zip(texts, prompts)]
        text_bytes = [*map(self.chat.tokenizer.count_bytes, completions)]
        return Rollout(tokens, completions, texts, text_bytes, rewards, seconds)


def prompt_tokens(chat: ChatTokenizer, prompt: Prompt) -> list[int]:
    """Returns the tokens of a conversation that asks the prompt."""
    return chat.prompt([{"role": "user", "content": prompt.text}]).tolist()


def rollout_batch(prompts: Sequence[list[int]], completions: Sequence[list[int]], seq: int) -> Batch:
    """Returns a Batch of prompts with their completions, `seq` places each, whose mask counts the completions' tokens."""
    examples = [
        Example(np.array(prompt + completion, np.int32), np.arange(len(prompt) + len(completion)) >= len(prompt), "")
        for prompt, completion in zip(prompts, completions)
    ]
    return next(evaluation_batches(examples, seq, len(examples), pack=False))


def score_completions(cfg: ModelConfig, params: Params, rollout: Rollout, seq: int, rows: int) -> Scores:
    """Scores completions under `params`, `rows` of `seq` places at once."""
    batch = rollout_batch(rollout.prompts, rollout.completions, seq)
    parts = [jax.tree.map(lambda x, at=at: x[at : at + rows], batch) for at in range(0, len(batch.tokens), rows)]
    logprobs = np.concatenate([np.asarray(log_probabilities(cfg, params, part)) for part in parts])
    bits, size = -logprobs.sum(1) / math.log(2), np.array(rollout.text_bytes)
    return Scores(batch, logprobs, bits / np.maximum(size, 1), float(bits.sum() / max(size.sum(), 1)))


@contextlib.contextmanager
def _time_limit(sentence: str) -> Iterator[None]:
    """Raises UserError(sentence) after REWARD_TIMEOUT in the block. Only in the main thread, to which signals come."""

    def ring(number: int, frame: object) -> None:
        raise UserError(f"{sentence} ({REWARD_TIMEOUT:g} s were not enough.)")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, REWARD_TIMEOUT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

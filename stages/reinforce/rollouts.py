"""The inference half of a round: answers drawn from a model that is only read, and what each of them is worth."""

import contextlib
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.inference import decode
from engine.inference.sampling_params import SamplingParams
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.batch import Batch
from engine.text.chat import Example
from engine.text.packing import evaluation_batches
from engine.training.rewards import Reward

PATIENCE = 2.0  # seconds for the rewards of a round


class Answer(NamedTuple):
    """The tokens that were drawn, the one that ended them among them, and whether one did."""

    tokens: list[int]
    ended: bool


def draw(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    *,
    ends: Collection[int],
    capacity: int,
) -> list[Answer]:
    """An answer to each prompt. Raises UserError as `decode.generate`.

    The end of an answer is a token like any other: it was drawn, and when to end is learnt too. So it is kept here, where
    `decode.generate` would leave it out and not say which of several it was.
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
    return [Answer(*pair) for pair in zip(tokens, ended)]


def as_batch(prompts: Sequence[list[int]], answers: Sequence[Answer], seq: int) -> Batch:
    """Prompts with their answers behind them, a row each of `seq` places, in which the answers' tokens count."""
    examples = []
    for prompt, answer in zip(prompts, answers):
        mask = np.arange(len(prompt) + len(answer.tokens)) >= len(prompt)
        examples.append(Example(np.array([*prompt, *answer.tokens], np.int32), mask, ""))
    return next(evaluation_batches(examples, seq, len(examples), pack=False))


def rewarded(reward: Reward, texts: Sequence[str], right: Sequence[int | None], patience: float = PATIENCE) -> list[float]:
    """What each text is worth. Raises UserError when that takes longer than `patience` seconds, as some patterns do."""
    with _within(patience, "The task's pattern takes too long on an answer: write it so that it has one way to match a text."):
        return [reward(text, number) for text, number in zip(texts, right)]


class _Late(BaseException):
    """The alarm rang; nothing in between is to take this for an error of its own."""


@contextlib.contextmanager
def _within(seconds: float, otherwise: str) -> Iterator[None]:
    """Raises UserError(otherwise) after so many seconds in the block, where signals come: in the main thread."""

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
        raise UserError(f"{otherwise} ({seconds:g} s were not enough.)") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

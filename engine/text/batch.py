"""Batches of training and evaluation: their order, by (seed, epoch), and the windows of one long text."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError


class Batch(NamedTuple):
    """B windows of T tokens, each with the token that follows it. NumPy or JAX arrays; a pytree
    either way.

    `mask` is True where the target counts, or in float32 the weight of its loss. Tokens of
    different `segments` of a row may not attend to one another; None is one segment a row, which
    spares the comparison.
    """

    tokens: Any  # (B, T) int32
    targets: Any  # (B, T) int32
    mask: Any  # (B, T) bool, or float32
    positions: Any  # (B, T) int32
    segments: Any = None  # (B, T) int32 or None


ORDER_VERSION = 2  # of the order, which run.json records: a run can only be resumed in its own
ALL = slice(None)


class EpochOrder:
    """The indices of `count` items that each step of `batch` rows reads: every item once an epoch,
    by a seed of 32 bits.

    Batches run on across the ends of epochs.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count = count
        self.batch = batch
        self.seed = seed

    def epoch(self, step: int) -> float:
        """Returns the epochs completed before a step."""
        return step * self.batch / self.count

    def at(self, step: int, rows: slice = ALL) -> list[tuple[int, int]]:
        """Returns (epoch, item) of each of the `rows` of `step` >= 0: those of one process, or all."""
        places = [divmod(step * self.batch + row, self.count) for row in range(self.batch)[rows]]
        return [(epoch, int(permutation(self.count, self.seed, epoch)[place])) for epoch, place in places]


@functools.lru_cache(2)  # a batch may read the end of one epoch and the beginning of the next
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of `count` items in an epoch, (count,) int64."""
    return random_words(count, seed, epoch).argsort(kind="stable")


def random_words(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns (count,) uint64 of Philox (Salmon et al. 2011), which NumPy never changes, as it may
    a Generator's numbers.
    """
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)


@dataclasses.dataclass
class TextBatches:
    """Training batches out of one long text, by random access: `at(step)` needs no earlier step.

    An epoch is a fresh shuffle of windows of `seq` targets, laid end to end from a place drawn
    anew, the text being a ring: every token is a target once, except fewer than `seq` that fill no
    window. Raises UserError for a text shorter than one.
    """

    tokens: np.ndarray  # (tokens,) any integer dtype, memory-mapped or not
    seq: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) < self.seq + 1:
            raise UserError(
                f"The text has {len(self.tokens)} tokens and one window of {self.seq} needs {self.seq + 1}: "
                "give a longer text or a shorter context."
            )
        self._ring = len(self.tokens) - 1  # targets
        self.order = EpochOrder(self._ring // self.seq, self.batch, self.seed)

    def at(self, step: int, rows: slice = ALL) -> Batch:
        """Returns the batch (batch, seq) of `step` >= 0, or some of its rows."""
        starts = [self._offset(epoch) + window * self.seq for epoch, window in self.order.at(step, rows)]
        return window_batch(self.tokens, np.add.outer(starts, np.arange(self.seq)) % self._ring)

    def _offset(self, epoch: int) -> int:
        # a seed that no order has
        return int(random_words(1, self.seed + 2**32, epoch)[0]) % self._ring


def evaluation_windows(tokens: np.ndarray, seq: int, stride: int, batch: int) -> Iterator[Batch]:
    """Yields batches (batch, seq) in which every token but the first is a target with mask True
    exactly once.

    Windows start `stride`, at most `seq`, apart and score only what the one before did not, so each
    token is predicted from more than `seq - stride` tokens (fewer only at the start of the text)
    and at most `seq`. The last window is moved back to end with the text. Padding has mask False.
    Raises UserError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise UserError(f"The text has {len(tokens)} tokens; to score one, at least 2 are needed.")
    targets = len(tokens) - 1
    last = max(0, targets - seq)
    for first in range(0, count_windows(len(tokens), seq, stride), batch):
        number = np.arange(first, first + batch)
        start = np.minimum(number * stride, last)
        # by the windows before
        scored = np.where(number == 0, 0, np.minimum((number - 1) * stride + seq, targets))
        at = start[:, None] + np.arange(seq)
        mask = (at >= scored[:, None]) & (at < targets)
        yield window_batch(tokens, np.minimum(at, targets - 1), mask)


def count_windows(tokens: int, seq: int, stride: int) -> int:
    """Counts the windows that `evaluation_windows` makes of a text of so many tokens."""
    return 1 + max(0, -(-(tokens - 1 - seq) // stride))


def window_batch(tokens: np.ndarray, at: np.ndarray, mask: np.ndarray | None = None) -> Batch:
    """Returns the batch of the windows tokens[at], `at` (B, T), with `mask` (B, T) or all targets counted."""
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(at.shape[1], dtype=np.int32), at.shape))
    if mask is None:
        mask = np.ones(at.shape, bool)
    return Batch(tokens[at].astype(np.int32), tokens[at + 1].astype(np.int32), mask, positions)

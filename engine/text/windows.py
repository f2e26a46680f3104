"""Cuts one long text into windows: shuffled batches to train on, by (seed, step), and the windows that an evaluation scores."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from engine.errors import UserError
from engine.text.batch import Batch
from engine.text.epoch_order import ALL, EpochOrder, random_words


@dataclasses.dataclass
class TextBatches:
    """Training batches out of one long text, by random access: `at(step)` needs no earlier step.

    An epoch is a fresh shuffle of windows of `seq` targets, laid end to end from a place drawn anew for the epoch, the text
    being a ring: every token is a target once, except fewer than `seq` that do not fill a window. Raises UserError as
    `EpochOrder`, and for a text shorter than one window.
    """

    tokens: np.ndarray  # (tokens,) any integer dtype, memory-mapped or not
    seq: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.seq < 1:
            raise UserError(f"A window must have at least 1 token, not {self.seq}.")
        if len(self.tokens) < self.seq + 1:
            raise UserError(
                f"The text has {len(self.tokens)} tokens and one window of {self.seq} needs {self.seq + 1}: give a "
                "longer text or a shorter context."
            )
        self._ring = len(self.tokens) - 1  # targets
        self.order = EpochOrder(self._ring // self.seq, self.batch, self.seed)
        self.epoch = self.order.epoch  # completed before a step

    def at(self, step: int, rows: slice = ALL) -> Batch:
        """Returns the batch (batch, seq) of `step` >= 0, or some of its rows."""
        starts = [self._offset(epoch) + window * self.seq for epoch, window in self.order.at(step, rows)]
        return window_batch(self.tokens, np.add.outer(starts, np.arange(self.seq)) % self._ring)

    def _offset(self, epoch: int) -> int:
        """Returns where the windows of an epoch start, by a seed that no order has."""
        return int(random_words(1, self.seed + 2**32, epoch)[0]) % self._ring


def evaluation_windows(tokens: np.ndarray, seq: int, stride: int, batch: int) -> Iterator[Batch]:
    """Yields batches (batch, seq) in which every token but the first is a target with mask True exactly once.

    Windows start `stride` apart and score only what the one before did not, so each token is predicted from more than
    `seq - stride` tokens (fewer only at the start of the text) and at most `seq`. The last window is moved back to end with
    the text. Padding has mask False. Raises UserError for a stride outside 1..seq or fewer than two tokens.
    """
    if not 1 <= stride <= seq:
        raise UserError(f"The stride must be between 1 and the window's {seq} tokens, not {stride}.")
    if batch < 1:
        raise UserError(f"An evaluation batch must have at least 1 row, not {batch}.")
    if len(tokens) < 2:
        raise UserError(f"The text has {len(tokens)} tokens; to score one, at least 2 are needed.")
    targets = len(tokens) - 1
    last = max(0, targets - seq)
    for first in range(0, count_windows(len(tokens), seq, stride), batch):
        number = np.arange(first, first + batch)
        start = np.minimum(number * stride, last)
        scored = np.where(number == 0, 0, np.minimum((number - 1) * stride + seq, targets))  # by the windows before
        at = start[:, None] + np.arange(seq)
        mask = (at >= scored[:, None]) & (at < targets)
        yield window_batch(tokens, np.minimum(at, targets - 1), mask)


def count_windows(tokens: int, seq: int, stride: int) -> int:
    """Counts the windows that `evaluation_windows` makes of a text of `tokens` tokens."""
    return 1 + max(0, -(-(tokens - 1 - seq) // stride))


def window_batch(tokens: np.ndarray, at: np.ndarray, mask: np.ndarray | None = None) -> Batch:
    """Returns the batch of the windows tokens[at], `at` (B, T), with `mask` (B, T) or all targets counted."""
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(at.shape[1], dtype=np.int32), at.shape))
    mask = np.ones(at.shape, bool) if mask is None else mask
    return Batch(tokens[at].astype(np.int32), tokens[at + 1].astype(np.int32), mask, positions)

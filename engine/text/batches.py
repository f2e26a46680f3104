"""Which tokens a step sees: a function of (seed, step) and nothing else; and the windows an evaluation walks over."""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from engine.errors import UserError
from engine.text.batch import Batch


@dataclasses.dataclass
class Batches:
    """Training batches out of one long text, by random access: `at(step)` needs no earlier step.

    An epoch is a fresh shuffle of windows of `seq` targets, laid end to end from a place that is drawn anew for the
    epoch, the text being a ring: every token is a target once, except fewer than `seq` that do not fill a window.
    Batches run on across the ends of epochs, so all have `batch` rows. With `processes`, each gets its own rows of the
    same global batch, in the order of `process`.

    Raises UserError when the text is shorter than one window, the batch does not divide over the processes, or the seed
    is not one of 32 bits.
    """

    tokens: np.ndarray  # (tokens,) any integer dtype, memory-mapped or not
    seq: int
    batch: int  # rows of the global batch
    seed: int
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        # Not at the top of the file: it takes a second, which an evaluation or a generation need not wait for.
        import grain

        for name in ("seq", "batch", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"Batches: {name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.process < self.processes:
            raise UserError(f"Batches: process {self.process} is not one of {self.processes}, counted from 0.")
        if self.batch % self.processes:
            raise UserError(f"A batch of {self.batch} rows does not divide over {self.processes} processes.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"The seed must be between 0 and {2**32 - 1}, not {self.seed}.")
        if len(self.tokens) < self.seq + 1:
            raise UserError(
                f"The text has {len(self.tokens)} tokens and one window of {self.seq} needs {self.seq + 1}: give a "
                "longer text or a shorter context."
            )
        self._ring = len(self.tokens) - 1  # targets
        self._windows = self._ring // self.seq
        # grain shuffles without a list of the windows and goes on to a new order when an index passes the end.
        self._order = grain.MapDataset.range(self._windows).seed(self.seed).shuffle()

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every window is seen once; not whole in general."""
        return self._windows / self.batch

    def epoch(self, step: int) -> float:
        """Epochs completed before `step`: 0.0 at step 0."""
        return step * self.batch / self._windows

    def at(self, step: int) -> Batch:
        """This process's rows, (batch / processes, seq), of the global batch of `step` >= 0."""
        rows = self.batch // self.processes
        first = step * self.batch + self.process * rows
        start = np.empty(rows, np.int64)
        for row, index in enumerate(range(first, first + rows)):
            start[row] = self._offset(index // self._windows) + self._order[index] * self.seq
        at = (start[:, None] + np.arange(self.seq)) % self._ring
        return _batch(self.tokens[at], self.tokens[at + 1], np.ones(at.shape, bool))

    def _offset(self, epoch: int) -> int:
        """Where the windows of an epoch start. A hash, as NumPy's generators may change between the parts of a run."""
        digest = hashlib.sha256(f"offset {self.seed} {epoch}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % self._ring


def evaluation_windows(tokens: np.ndarray, seq: int, stride: int, batch: int) -> Iterator[Batch]:
    """Batches (batch, seq) in which every token but the first is a target with mask True exactly once.

    Windows start `stride` apart and score only what the one before did not, so each token is predicted from more than
    `seq - stride` tokens before it (fewer only at the start of the text) and at most `seq`. The last window is moved
    back to end with the text. What only fills up, a row of the last batch or the rest of a short text, has mask False.
    Raises UserError for a stride outside 1..seq or fewer than two tokens.
    """
    if not 1 <= stride <= seq:
        raise UserError(f"The stride must be between 1 and the window's {seq} tokens, not {stride}.")
    if batch < 1:
        raise UserError(f"An evaluation batch must have at least 1 row, not {batch}.")
    if len(tokens) < 2:
        raise UserError(f"The text has {len(tokens)} tokens; to score one, at least 2 are needed.")
    targets = len(tokens) - 1
    last = max(0, targets - seq)
    windows = evaluation_count(len(tokens), seq, stride)
    for first in range(0, windows, batch):
        number = np.arange(first, first + batch)
        start = np.minimum(number * stride, last)
        scored = np.where(number == 0, 0, np.minimum((number - 1) * stride + seq, targets))  # by the windows before
        at = start[:, None] + np.arange(seq)
        mask = (at >= scored[:, None]) & (at < targets)
        at = np.minimum(at, targets - 1)
        yield _batch(tokens[at], tokens[at + 1], mask)


def evaluation_count(tokens: int, seq: int, stride: int) -> int:
    """How many windows `evaluation_windows` makes of a text of `tokens` tokens."""
    return 1 + max(0, -(-(tokens - 1 - seq) // stride))


def _batch(tokens: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> Batch:
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape))
    return Batch(tokens.astype(np.int32), targets.astype(np.int32), mask, positions, None)

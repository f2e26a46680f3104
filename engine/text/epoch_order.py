"""The order of training data: a shuffle of each epoch, which any step can look up: a function of (seed, epoch) alone."""

import functools

import numpy as np

from engine.errors import UserError

VERSION = 2  # of the order, which run.json records: a run can only be resumed in its own
ALL = slice(None)


class EpochOrder:
    """The indices of `count` items that each step of `batch` rows reads: every item once an epoch.

    Batches run on across the ends of epochs. Raises UserError for no items, no rows, or a seed that is not one of 32 bits.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        if count < 1:
            raise UserError("There are no examples to make batches of.")
        if batch < 1:
            raise UserError(f"A batch must have at least 1 row, not {batch}.")
        if not 0 <= seed < 2**32:
            raise UserError(f"The seed must be between 0 and {2**32 - 1}, not {seed}.")
        self.count, self.batch, self.seed = count, batch, seed

    def epoch(self, step: int) -> float:
        """Returns the epochs completed before `step`: 0.0 at step 0."""
        return step * self.batch / self.count

    def at(self, step: int, rows: slice = ALL) -> list[tuple[int, int]]:
        """Returns (epoch, item) of each of the `rows` of `step` >= 0: those of one process, or all."""
        places = [divmod(step * self.batch + row, self.count) for row in range(self.batch)[rows]]
        return [(epoch, int(permutation(self.count, self.seed, epoch)[place])) for epoch, place in places]


@functools.lru_cache(2)  # a batch may read the end of one epoch and the beginning of the next
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of `count` items in an epoch: (count,) int64."""
    return random_words(count, seed, epoch).argsort(kind="stable")


def random_words(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns (count,) uint64 of Philox (Salmon et al. 2011), which NumPy never changes, as it may a Generator's numbers."""
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)

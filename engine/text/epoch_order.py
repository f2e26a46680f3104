"""The order of training data: a shuffle of each epoch that any step can look up, as a function of (seed, epoch) alone.

The permutation is a block cipher over the indices (Simon: Beaulieu et al. 2013, eprint 2013/404; four rounds), applied again
where it leaves the range (cycle walking: Black and Rogaway 2002), so nothing is stored, however many items there are.
The order is that of grain's `MapDataset.range(count).seed(seed).shuffle()`, by which earlier runs were trained.
"""

import functools

import numpy as np

from engine.errors import UserError

MIN_BITS = 16  # bits of a block: permutations of fewer show patterns
WORD = 2**32 - 1


class EpochOrder:
    """The indices of `count` items that each step of `batch` rows reads: every item once an epoch.

    Batches run on across the ends of epochs. `rows`: those of a batch to return, the own ones of one process of several.
    Raises UserError for no items, no rows, or a seed that is not one of 32 bits.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        if count < 1:
            raise UserError("There are no examples to make batches of.")
        if batch < 1:
            raise UserError(f"A batch must have at least 1 row, not {batch}.")
        if not 0 <= seed <= WORD:
            raise UserError(f"The seed must be between 0 and {WORD}, not {seed}.")
        self.count, self.batch, self.rows = count, batch, slice(None)
        self._seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])

    def epoch(self, step: int) -> float:
        """Returns the epochs completed before `step`: 0.0 at step 0."""
        return step * self.batch / self.count

    def epochs_at(self, step: int) -> np.ndarray:
        """Returns the epoch that each of the rows of `step` belongs to: (rows,) int64."""
        return self._numbers(step) // self.count

    def at(self, step: int) -> np.ndarray:
        """Returns the item that each of the rows of `step` >= 0 reads: (rows,) int64."""
        epochs = self.epochs_at(step)
        place = self._numbers(step) - epochs * self.count
        parts = [permute(place[epochs == epoch], self.count, (self._seed + int(epoch)) & WORD) for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _numbers(self, step: int) -> np.ndarray:
        return step * self.batch + np.arange(self.batch)[self.rows]


def permute(index: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns where a random permutation of range(count) puts each index (n,) int64."""
    if count <= 2**MIN_BITS:
        return _small_permutation(count, seed)[index]
    bits = (count - 1).bit_length()
    keys = _round_keys(seed)
    values = _encrypt(index, bits + bits % 2, keys)
    while (outside := values >= count).any():
        values[outside] = _encrypt(values[outside], bits + bits % 2, keys)
    return values


@functools.lru_cache(4)
def _small_permutation(count: int, seed: int) -> np.ndarray:
    """Returns all of a small permutation: walking its long cycles one index at a time would take up to 65,536 rounds."""
    first = _encrypt(np.arange(2**MIN_BITS), MIN_BITS, _round_keys(seed))
    walk = first.copy()
    walk[:count] = np.arange(count)  # an index in range has arrived
    for _ in range(MIN_BITS):
        walk = walk[walk]  # twice as many rounds each time
    return walk[first[:count]]


def _encrypt(value: np.ndarray, bits: int, keys: list[int]) -> np.ndarray:
    width = bits // 2
    mask = (1 << width) - 1
    turn = lambda word, by: ((word << by) | (word >> (width - by))) & mask
    mix = lambda word: (turn(word, 1) & turn(word, 8)) ^ turn(word, 2)
    left, right = value >> width, value & mask
    for key in keys:
        left, right = right, left ^ mix(right) ^ (key & mask)
    return (left << width) | right


def _round_keys(seed: int) -> list[int]:
    """Returns the four words that C++'s std::seed_seq makes of one (ISO C++, [rand.util.seedseq], for n = 4 and s = 1)."""
    words = [0x8B8B8B8B] * 4
    scramble = lambda value: value ^ (value >> 27)
    for k, add in enumerate((1, 1 + seed, 2, 3)):
        word = 1664525 * scramble(words[k] ^ words[(k + 1) % 4] ^ words[k - 1]) & WORD
        more = (word + add) & WORD
        words[(k + 1) % 4], words[(k + 2) % 4], words[k] = (
            (words[(k + 1) % 4] + word) & WORD, (words[(k + 2) % 4] + more) & WORD, more,
        )  # fmt: skip
    for k in range(4):
        word = 1566083941 * scramble((words[k] + words[(k + 1) % 4] + words[k - 1]) & WORD) & WORD
        less = (word - k) & WORD
        words[(k + 1) % 4], words[(k + 2) % 4], words[k] = words[(k + 1) % 4] ^ word, words[(k + 2) % 4] ^ less, less
    return words

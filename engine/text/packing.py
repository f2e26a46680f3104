"""Packs examples into rows of one length: several a row, which do not attend to one another, or one a row."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.text.batch import Batch
from engine.text.chat_tokenizer import Example
from engine.text.epoch_order import ALL, EpochOrder
from engine.text.examples import Pair


@dataclasses.dataclass
class PackedBatches:
    """Training batches of packed examples, by random access: `at(step)` needs no earlier step.

    Examples are packed into rows once (`pack_rows`), which each epoch shuffles anew (`EpochOrder`). In a row each example is a
    segment with positions from 0, so that it gets the loss it has alone. Where an example has a weight, all masks are float32
    and hold it. With `pack` False each example has a row for itself.
    Raises UserError as `EpochOrder`, and for an example of more than seq + 1 tokens.
    """

    examples: Sequence[Example]
    seq: int
    batch: int
    seed: int
    pack: bool = True

    def __post_init__(self) -> None:
        self._mask_type = np.float32 if any(example.weight != 1 for example in self.examples) else bool  # of every batch
        self._rows = pack_rows(self.examples, self.seq, self.pack)
        self.order = EpochOrder(len(self._rows), self.batch, self.seed)
        self.epoch = self.order.epoch  # completed before a step

    def at(self, step: int, rows: slice = ALL) -> Batch:
        """Returns the batch (batch, seq) of `step` >= 0, or some of its rows."""
        packed = [[self.examples[index] for index in self._rows[row]] for _, row in self.order.at(step, rows)]
        return _batch(packed, self.seq, self.pack, self._mask_type)


class PairBatch(NamedTuple):
    """B chosen answers and the B rejected ones, row by row, and which pair each row is; -1 for a row of padding."""

    chosen: Batch
    rejected: Batch
    pair: np.ndarray  # (B,) int32


def evaluation_batches(examples: Sequence[Example], seq: int, batch: int, pack: bool = True) -> Iterator[Batch]:
    """Yields batches (batch, seq) with each example exactly once; rows of padding have mask False."""
    rows = pack_rows(examples, seq, pack)
    for first in range(0, len(rows), batch):
        part = [[examples[index] for index in row] for row in rows[first : first + batch]]
        yield _batch(part + [[]] * (batch - len(part)), seq, pack)


def evaluation_pairs(pairs: Sequence[Pair], seq: int, batch: int) -> Iterator[PairBatch]:
    """Yields batches with each pair once, in order; rows of padding have `pair` -1 and mask False."""
    for first in range(0, len(pairs), batch):
        index = np.arange(first, first + batch)
        yield pair_batch(pairs, np.where(index < len(pairs), index, -1), seq)


def pair_batch(pairs: Sequence[Pair], index: np.ndarray, seq: int) -> PairBatch:
    """Returns the batch of the pairs `index` (B,), -1 for none. Raises UserError for an answer of more than seq + 1 tokens."""
    rows = lambda side: [[pairs[at][side]] if at >= 0 else [] for at in index]
    chosen, rejected = (_batch(rows(side), seq, pack=False) for side in (0, 1))
    return PairBatch(chosen, rejected, index.astype(np.int32))


def pack_rows(examples: Sequence[Example], seq: int, pack: bool) -> list[list[int]]:
    """Packs examples into rows of `seq` tokens, as indices: the longest first, each into the row where it leaves least room.

    That is best-fit decreasing: at most 11/9 of the fewest rows possible (Johnson 1974), in practice a few percent more.
    """
    sizes = [_places(example, seq) for example in examples]
    if not pack:
        return [[index] for index in range(len(examples))]
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # places left -> rows
    room_bits = 0  # bit r: with_room[r] is not empty; best fit: the lowest bit from `size` up
    for index in sorted(range(len(examples)), key=lambda index: -sizes[index]):
        fitting = room_bits >> sizes[index]
        if fitting:
            room = sizes[index] + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                room_bits &= ~(1 << room)
        else:
            room, row = seq, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - sizes[index]
        with_room.setdefault(left, []).append(row)
        room_bits |= (left > 0) << left
    return rows


def _places(example: Example, seq: int) -> int:
    """Returns how many places of a row an example takes: one fewer than its tokens, as the last is only a target."""
    size = len(example.tokens) - 1
    if not 0 < size <= seq:
        raise UserError(f"{example.where or 'An example'} has {size + 1} tokens; a row of {seq} takes 2 to {seq + 1}.")
    return size


def _batch(rows: Sequence[Sequence[Example]], seq: int, pack: bool, mask_type: type = bool) -> Batch:
    """Lays each row's examples side by side. Padding behind them is segment 0, with mask False. A float mask has weights."""
    tokens, targets, positions, segments = np.zeros((4, len(rows), seq), np.int32)
    mask: np.ndarray = np.zeros((len(rows), seq), mask_type)
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, 1):
            size = _places(example, seq)
            place = row, slice(at, at + size)
            tokens[place], targets[place], mask[place] = (
                example.tokens[:-1],
                example.tokens[1:],
                example.mask[1:] * example.weight,
            )
            positions[place], segments[place] = np.arange(size), number
            at += size
    return Batch(tokens, targets, mask, positions, segments if pack else None)

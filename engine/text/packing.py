"""Packs training examples into rows, and rows into batches."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from engine.format import quantity
from engine.text.batch import ALL, Batch, EpochOrder
from engine.text.chat_tokenizer import Example


@dataclasses.dataclass
class PackedBatches:
    """Training batches of packed examples, by random access: `at(step)` needs no earlier step.

    Rows are packed once (`pack_rows`), and each epoch shuffles them anew (`EpochOrder`). In a row
    each example is a segment with positions from 0, so that it gets the loss it has alone. Where an
    example has a weight, all masks are float32 and hold it.
    """

    examples: Sequence[Example]
    seq: int
    batch: int
    seed: int
    pack: bool = True

    def __post_init__(self) -> None:
        # Of every batch.
        self._mask_type = np.float32 if any(example.weight != 1 for example in self.examples) else bool
        if self.pack:
            self._rows = pack_rows(self.examples, self.seq)
        else:
            self._rows = [[at] for at in range(len(self.examples))]
        self.order = EpochOrder(len(self._rows), self.batch, self.seed)

    def describe(self) -> str:
        filled = sum(len(example.tokens) - 1 for example in self.examples) / (len(self._rows) * self.seq)
        rows = f"{quantity(len(self._rows), 'row')} of {self.seq} tokens, {filled:.1%} of them used"
        if self.pack:
            return f"{quantity(len(self.examples), 'example')} in {rows}"
        return f"off: {rows}"

    def at(self, step: int, rows: slice = ALL) -> Batch:
        packed = [[self.examples[index] for index in self._rows[row]] for _, row in self.order.at(step, rows)]
        return _batch(packed, self.seq, self.pack, self._mask_type)


def evaluation_batches(examples: Sequence[Example], seq: int, batch: int) -> Iterator[Batch]:
    """Yields batches (batch, seq) with each example exactly once; rows of padding have mask False.

    Each target counts once here, whatever weight its row has in training.
    """
    rows = pack_rows(examples, seq)
    for first in range(0, len(rows), batch):
        part = [[examples[index] for index in row] for row in rows[first : first + batch]]
        yield _batch(part + [[]] * (batch - len(part)), seq)


def example_rows(examples: Sequence[Example | None], seq: int) -> Batch:
    """Returns a batch (rows, seq) of an example a row, of at most `seq` + 1 tokens; None is a row of
    padding.
    """
    rows: list[list[Example]] = []
    for example in examples:
        rows.append([example] if example else [])
    return _batch(rows, seq, pack=False)


def pack_rows(examples: Sequence[Example], seq: int) -> list[list[int]]:
    """Packs examples into rows of `seq` tokens, as indices: the longest first, each into the row
    where it leaves least room.

    This is best-fit decreasing: at most 11/9 of the fewest rows possible (Johnson 1974), in
    practice a few percent more.
    """
    sizes = [len(example.tokens) - 1 for example in examples]  # the last is only a target
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # places left -> rows
    room_bits = 0  # bit r is set where with_room[r] has a row
    for index in sorted(range(len(examples)), key=lambda index: -sizes[index]):
        size = sizes[index]
        fitting_bits = room_bits >> size
        if fitting_bits:
            room = size + _lowest_bit(fitting_bits)
            row = with_room[room].pop()
            if not with_room[room]:
                room_bits &= ~(1 << room)
        else:
            room = seq
            row = len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - size
        with_room.setdefault(left, []).append(row)
        if left > 0:
            room_bits |= 1 << left
    return rows


def _lowest_bit(bits: int) -> int:
    """Returns the number of the lowest bit that is set: 2 for 0b1100."""
    return (bits & -bits).bit_length() - 1


def _batch(rows: Sequence[Sequence[Example]], seq: int, pack: bool = True, mask_type: type = bool) -> Batch:
    """Lays each row's examples side by side. Padding behind them is segment 0, with mask False. A
    float mask has weights.
    """
    shape = (len(rows), seq)
    tokens = np.zeros(shape, np.int32)
    targets = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    segments = np.zeros(shape, np.int32)
    mask: np.ndarray = np.zeros(shape, mask_type)
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, 1):
            size = len(example.tokens) - 1
            inside = slice(at, at + size)
            tokens[row, inside] = example.tokens[:-1]
            targets[row, inside] = example.tokens[1:]
            mask[row, inside] = example.mask[1:] * example.weight
            positions[row, inside] = np.arange(size)
            segments[row, inside] = number
            at += size
    if pack:
        return Batch(tokens, targets, mask, positions, segments)
    return Batch(tokens, targets, mask, positions)

"""Tokenizes the rows of a dataset into training examples, counts what was cut or dropped, and packs them into batches."""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.format import quantity
from engine.text import OnProgress
from engine.text.batch import ALL, Batch, EpochOrder
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.conversations import Conversation, Record, Text, assistant_message
from engine.text.template import InvalidConversation, Message

SILENT = "the assistant says nothing in one of its turns"


class Pair(NamedTuple):
    """An answer and another to compare it with, each with its prompt: the one it is preferred to, or as of `mismatch`."""

    answer: Example
    other: Example


def mismatch(answers: Sequence[Example], seq: int) -> list[Pair]:
    """Pairs each answer with its prompt and the answer of the next row that has another prompt, or of the next row.

    That is cut to `seq` + 1 tokens.
    """
    starts = [int(example.mask.argmax()) for example in answers]
    prompts = [example.tokens[:start] for example, start in zip(answers, starts)]
    # Rows with another prompt than the row before; the first is behind the last.
    others = [at for at, prompt in enumerate(prompts) if not np.array_equal(prompts[at - 1], prompt)]
    pairs = []
    for at, (example, prompt) in enumerate(zip(answers, prompts)):
        other = others[bisect.bisect(others, at) % len(others)] if others else (at + 1) % len(answers)
        tokens, mask = (part[starts[other] :] for part in answers[other][:2])
        tokens, mask = np.concatenate([prompt, tokens]), np.concatenate([np.zeros(len(prompt), bool), mask])
        pairs.append(Pair(example, Example(tokens[: seq + 1], mask[: seq + 1], example.where)))
    return pairs


@dataclasses.dataclass
class Dataset:
    """The rows of a data set that are used, with their examples; those truncated or dropped, each as (file:line, reason)."""

    used: list[tuple[Record, list[Any]]] = dataclasses.field(default_factory=list)  # those truncated are among them
    truncated: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def examples(self) -> list[Any]:
        return [example for _, examples in self.used for example in examples]

    def describe(self) -> list[str]:
        """Returns lines for people: the counts, and for each reason the first row it was given for."""
        used, dropped, cut = len(self.used), len(self.dropped), len(self.truncated)
        lines = [f"{used:,} of {quantity(used + dropped, 'row')} kept, {cut:,} of them truncated; {dropped:,} dropped"]
        for verb, rows in (("truncated", self.truncated), ("dropped", self.dropped)):
            reasons, first = Counter(reason for _, reason in rows), {reason: where for where, reason in reversed(rows)}
            lines += [f"{count:,} {verb}: {reason} ({first[reason]} first)" for reason, count in reasons.items()]
        return lines


def make_examples(
    rows: Iterable[Record],
    chat: ChatTokenizer,
    seq: int,
    report: OnProgress = None,
    rate: bool = False,
    full: bool = False,
) -> Dataset:
    """Makes examples of at most seq + 1 tokens (seq inputs, and the target after each), or pairs of preferences.

    `rate`: makes an example of each answer with a label, and two of a preference; a bad one's weight is negative. `full`: all
    of a conversation is in the loss. Cuts the end off a longer conversation, and a plain text into pieces, all in the loss from
    BOS to EOS. A conversation is dropped when no answer begins early enough or the template refuses it, and a preference when
    it is longer. Raises UserError, with file:line, when the template fails, and when nothing is left.
    """
    dataset, rows, parts = Dataset(), list(rows), list[Any]()
    for number, row in enumerate(rows, 1):
        try:
            if row.weight == 0:
                raise InvalidConversation("its weight is 0")
            if rate and not isinstance(row, Text):
                parts, cut = _rated_answers(row, chat, seq), False
            elif isinstance(row, Conversation) and row.rejected is not None:
                parts, cut = [Pair(*_preference(row, chat, seq))], False
            else:
                parts, cut = _examples(row, chat, seq, full)
        except InvalidConversation as refusal:
            dataset.dropped.append((row.where, str(refusal)))
            continue
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        dataset.used.append((row, parts))
        if cut:
            dataset.truncated.append((row.where, f"longer than {seq} tokens, so its end is cut off"))
        if report:
            report(number, len(rows))
    if not dataset.used:
        if not dataset.dropped:
            raise UserError("There is nothing in it to learn from.")
        where, reason = dataset.dropped[0]
        raise UserError(f"None of {len(rows):,} rows can be trained on; the first, {where}: {reason.rstrip('.')}.")
    return dataset


def _examples(row: Conversation | Text, chat: ChatTokenizer, seq: int, full: bool) -> tuple[list[Example], bool]:
    """Returns the examples of a row, and whether its end was cut off."""
    if isinstance(row, Text):
        ids = (chat.tokenizer.bos_ids, chat.tokenizer.encode(row.text), [chat.tokenizer.eos_id])
        tokens = np.concatenate(ids, dtype=np.int32, casting="unsafe")
        pieces = (tokens[at : at + seq + 1] for at in range(0, max(1, len(tokens) - 1), seq))
        examples = [Example(piece, np.ones(len(piece), bool), row.where) for piece in pieces]
    else:
        if row.label is False:
            raise UserError(
                "`label` is false, an answer not to give, which this objective would train: leave the row out, or train with "
                "--objective preference --loss kto."
            )
        for index, message in enumerate(row.messages):
            if message["role"] == "assistant" and not message["content"].strip() and index not in row.context:
                raise InvalidConversation(SILENT)
        examples = chat.examples(row.messages, row.where, row.context)
        if full:
            examples = [each._replace(mask=np.ones(len(each.mask), bool)) for each in examples[-1:]]
    fitted = [Example(each.tokens[: seq + 1], each.mask[: seq + 1], each.where, row.weight) for each in examples]
    fitted = [example for example in fitted if example.mask[1:].any()]  # a target with a token before it
    if not fitted:
        raise InvalidConversation(f"its first {seq} tokens hold nothing to train on")
    return fitted, count_targets(fitted) < count_targets(examples)


def count_targets(examples: Sequence[Example]) -> int:
    return sum(int(np.count_nonzero(example.mask[1:])) for example in examples)


def _answer(messages: Sequence[Message], where: str, chat: ChatTokenizer, seq: int) -> Example:
    """Returns the example of the last message, an answer, which must be whole."""
    if not messages[-1]["content"].strip():
        raise InvalidConversation(SILENT)
    example = chat.answer_example(messages, where)
    if len(example.tokens) > seq + 1:
        raise InvalidConversation(f"longer than {seq} tokens")
    return example


def _preference(row: Conversation, chat: ChatTokenizer, seq: int) -> tuple[Example, Example]:
    """Returns the examples of a preference: of the answer at the end, and of the rejected one."""
    rejected = (*row.messages[:-1], assistant_message(row.rejected or ""))
    chosen, other = (_answer(messages, row.where, chat, seq) for messages in (row.messages, rejected))
    if np.array_equal(chosen.tokens, other.tokens):  # templates may strip what texts differ by
        raise InvalidConversation("both answers are the same")
    return chosen, other


def _rated_answers(row: Conversation, chat: ChatTokenizer, seq: int) -> list[Example]:
    if row.rejected is not None:
        good, bad = _preference(row, chat, seq)
        return [good, bad._replace(weight=-1.0)]
    if row.label is None:
        raise UserError("`label` should be true for a good answer, or false for a bad one.")
    return [_answer(row.messages, row.where, chat, seq)._replace(weight=row.weight if row.label else -row.weight)]


@dataclasses.dataclass
class PackedBatches:
    """Training batches of packed examples, by random access: `at(step)` needs no earlier step.

    Rows are packed once (`pack_rows`), and each epoch shuffles them anew (`EpochOrder`). In a row each example is a segment
    with positions from 0, so that it gets the loss it has alone. Where an example has a weight, all masks are float32 and hold
    it.
    """

    examples: Sequence[Example]
    seq: int
    batch: int
    seed: int
    pack: bool = True

    def __post_init__(self) -> None:
        self._mask_type = np.float32 if any(example.weight != 1 for example in self.examples) else bool  # of every batch
        self._rows = pack_rows(self.examples, self.seq) if self.pack else [[at] for at in range(len(self.examples))]
        self.order = EpochOrder(len(self._rows), self.batch, self.seed)

    def describe(self) -> str:
        filled = sum(len(example.tokens) - 1 for example in self.examples) / (len(self._rows) * self.seq)
        rows = f"{quantity(len(self._rows), 'row')} of {self.seq} tokens, {filled:.1%} of them used"
        return f"{quantity(len(self.examples), 'example')} in {rows}" if self.pack else f"off: {rows}"

    def at(self, step: int, rows: slice = ALL) -> Batch:
        packed = [[self.examples[index] for index in self._rows[row]] for _, row in self.order.at(step, rows)]
        return _batch(packed, self.seq, self.pack, self._mask_type)


def evaluation_batches(examples: Sequence[Example], seq: int, batch: int) -> Iterator[Batch]:
    """Yields batches (batch, seq) with each example exactly once; rows of padding have mask False."""
    rows = pack_rows(examples, seq)
    for first in range(0, len(rows), batch):
        part = [[examples[index] for index in row] for row in rows[first : first + batch]]
        yield _batch(part + [[]] * (batch - len(part)), seq)


def example_rows(examples: Sequence[Example | None], seq: int) -> Batch:
    """Returns a batch (rows, seq) of an example a row, None a row of padding."""
    return _batch([[example] if example else [] for example in examples], seq, pack=False)


def pack_rows(examples: Sequence[Example], seq: int) -> list[list[int]]:
    """Packs examples into rows of `seq` tokens, as indices: the longest first, each into the row where it leaves least room.

    This is best-fit decreasing: at most 11/9 of the fewest rows possible (Johnson 1974), in practice a few percent more.
    """
    sizes = [len(example.tokens) - 1 for example in examples]  # the last is only a target
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


def _batch(rows: Sequence[Sequence[Example]], seq: int, pack: bool = True, mask_type: type = bool) -> Batch:
    """Lays each row's examples side by side. Padding behind them is segment 0, with mask False. A float mask has weights."""
    tokens, targets, positions, segments = np.zeros((4, len(rows), seq), np.int32)
    mask: np.ndarray = np.zeros((len(rows), seq), mask_type)
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, 1):
            size = len(example.tokens) - 1
            place = row, slice(at, at + size)
            tokens[place], targets[place] = example.tokens[:-1], example.tokens[1:]
            mask[place] = example.mask[1:] * example.weight
            positions[place], segments[place] = np.arange(size), number
            at += size
    return Batch(tokens, targets, mask, positions, segments if pack else None)

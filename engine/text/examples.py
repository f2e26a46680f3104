"""Makes training examples of the rows of a dataset, and counts what was cut or dropped."""

import bisect
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.format import quantity
from engine.text import OnProgress
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.conversations import Conversation, Record, Text, assistant_message
from engine.text.template import InvalidConversation, Message

SILENT = "the assistant says nothing in one of its turns"


class Pair(NamedTuple):
    """An answer, and another to the same prompt that it is preferred to, each with that prompt."""

    answer: Example
    other: Example

    @property
    def value(self) -> float:
        """The weight of the pair's loss."""
        return self.answer.weight


class Rating(NamedTuple):
    """An answer with its prompt, which is a good or a bad one: a row of KTO's data."""

    answer: Example
    is_good: bool

    @property
    def value(self) -> float:
        """The weight of the answer's loss, negative for a bad one."""
        if self.is_good:
            return self.answer.weight
        return -self.answer.weight


class RatedPair(NamedTuple):
    """A Rating, and its prompt with an answer to another one (`mismatch`): by these KTO estimates
    how far a model moved.
    """

    answer: Example
    other: Example
    is_good: bool

    @property
    def value(self) -> float:
        """As of Rating."""
        return Rating(self.answer, self.is_good).value


def mismatch(ratings: Sequence[Rating], seq: int) -> list[RatedPair]:
    """Pairs each answer with its prompt and the answer of the next row that has another prompt, or
    of the next row.

    That is cut to `seq` + 1 tokens.
    """
    prompts = [_prompt_of(rating.answer) for rating in ratings]
    # Rows with another prompt than the row before; the first is behind the last.
    changes = [at for at, prompt in enumerate(prompts) if not np.array_equal(prompts[at - 1], prompt)]
    pairs = []
    for at, rating in enumerate(ratings):
        if changes:
            other = changes[bisect.bisect(changes, at) % len(changes)]
        else:
            other = (at + 1) % len(ratings)
        mismatched = _with_answer_of(ratings[other].answer, prompts[at], seq)
        mismatched = mismatched._replace(where=rating.answer.where)
        pairs.append(RatedPair(rating.answer, mismatched, rating.is_good))
    return pairs


def _prompt_of(example: Example) -> np.ndarray:
    """Returns the tokens of an example before its answer."""
    return example.tokens[: example.mask.argmax()]


def _with_answer_of(example: Example, prompt: np.ndarray, seq: int) -> Example:
    """Returns an example of a prompt and the answer of another example, cut to seq + 1 tokens."""
    start = example.mask.argmax()
    tokens = np.concatenate([prompt, example.tokens[start:]])
    mask = np.concatenate([np.zeros(len(prompt), bool), example.mask[start:]])
    return Example(tokens[: seq + 1], mask[: seq + 1], example.where)


@dataclasses.dataclass
class Dataset:
    """The rows of a data set that are used, with their examples; those truncated or dropped, each
    as (file:line, reason).
    """

    # those truncated are among them
    used: list[tuple[Record, list[Any]]] = dataclasses.field(default_factory=list)
    truncated: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def examples(self) -> list[Any]:
        return list(itertools.chain.from_iterable(examples for _, examples in self.used))

    def describe(self) -> list[str]:
        """Returns lines for people: the counts, and for each reason the first row it was given for."""
        used = len(self.used)
        dropped = len(self.dropped)
        cut = len(self.truncated)
        lines = [
            f"{used:,} of {quantity(used + dropped, 'row')} kept, "
            f"{cut:,} of them truncated; {dropped:,} dropped"
        ]
        for verb, rows in (("truncated", self.truncated), ("dropped", self.dropped)):
            reasons = Counter(reason for _, reason in rows)
            first = {reason: where for where, reason in reversed(rows)}
            lines += [
                f"{count:,} {verb}: {reason} ({first[reason]} first)" for reason, count in reasons.items()
            ]
        return lines


def make_examples(
    rows: Iterable[Record], chat: ChatTokenizer, seq: int, report: OnProgress = None
) -> Dataset:
    """Makes an Example of each of the assistant's turns, and of each piece of a plain text, all of
    which is in the loss.

    An example has at most seq + 1 tokens: seq inputs, and the target after each. The end of a
    longer conversation is cut off, and a plain text is cut into pieces, from BOS to EOS. A
    conversation is dropped when no answer begins early enough or the template refuses it. Raises
    UserError, with file:line, when the template fails, and when nothing is left.
    """
    return _make_dataset(rows, seq, report, functools.partial(_answers_or_pieces, chat=chat, seq=seq))


def make_whole_examples(
    rows: Iterable[Record], chat: ChatTokenizer, seq: int, report: OnProgress = None
) -> Dataset:
    """Makes an Example of each conversation, all of which is in the loss; else as `make_examples`."""
    return _make_dataset(
        rows, seq, report, functools.partial(_whole_conversation_or_pieces, chat=chat, seq=seq)
    )


def make_pairs(rows: Iterable[Record], chat: ChatTokenizer, seq: int, report: OnProgress = None) -> Dataset:
    """Makes a Pair of each preference, of at most seq + 1 tokens an answer; a longer one is
    dropped, as in `make_examples`.
    """

    def pair(row: Record) -> tuple[list[Pair], bool]:
        chosen, rejected = _preference(row, chat, seq)
        return [Pair(chosen, rejected)], False

    return _make_dataset(rows, seq, report, pair)


def make_ratings(rows: Iterable[Record], chat: ChatTokenizer, seq: int, report: OnProgress = None) -> Dataset:
    """Makes a Rating of each answer with a label, and two of a preference; a longer one is dropped,
    as in `make_pairs`.
    """
    return _make_dataset(rows, seq, report, lambda row: (_ratings(row, chat, seq), False))


def _make_dataset(
    rows: Iterable[Record], seq: int, report: OnProgress, make_row: Callable[[Record], tuple[list[Any], bool]]
) -> Dataset:
    """Returns the dataset of all that `make_row` makes: a row's examples, and whether its end was cut off."""
    dataset = Dataset()
    rows = list(rows)
    for number, row in enumerate(rows, 1):
        try:
            if row.weight == 0:
                raise InvalidConversation("its weight is 0")
            examples, is_cut = make_row(row)
        except InvalidConversation as refusal:
            dataset.dropped.append((row.where, str(refusal)))
            continue
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        dataset.used.append((row, examples))
        if is_cut:
            dataset.truncated.append((row.where, f"longer than {seq} tokens, so its end is cut off"))
        if report:
            report(number, len(rows))
    if not dataset.used:
        if not dataset.dropped:
            raise UserError("There is nothing in it to learn from.")
        where, reason = dataset.dropped[0]
        raise UserError(
            f"None of {len(rows):,} rows can be trained on; the first, {where}: {reason.rstrip('.')}."
        )
    return dataset


def _answers_or_pieces(row: Record, chat: ChatTokenizer, seq: int) -> tuple[list[Example], bool]:
    if isinstance(row, Text):
        examples = _pieces(row, chat, seq)
    else:
        examples = _answers(row, chat)
    return _fit(examples, row, seq)


def _whole_conversation_or_pieces(row: Record, chat: ChatTokenizer, seq: int) -> tuple[list[Example], bool]:
    if isinstance(row, Text):
        return _fit(_pieces(row, chat, seq), row, seq)
    whole = _answers(row, chat)[-1]
    return _fit([whole._replace(mask=np.ones(len(whole.mask), bool))], row, seq)


def _pieces(row: Text, chat: ChatTokenizer, seq: int) -> list[Example]:
    tokenizer = chat.tokenizer
    ids = (tokenizer.bos_ids, tokenizer.encode(row.text), [tokenizer.eos_id])
    tokens = np.concatenate(ids, dtype=np.int32, casting="unsafe")
    starts = range(0, max(1, len(tokens) - 1), seq)
    pieces = [tokens[start : start + seq + 1] for start in starts]
    return [Example(piece, np.ones(len(piece), bool), row.where) for piece in pieces]


def _answers(row: Conversation, chat: ChatTokenizer) -> list[Example]:
    if row.label is False:
        raise UserError(
            "`label` is false, an answer not to give, which this objective would train: "
            "leave the row out, or train on ratings (KTO)."
        )
    for index, message in enumerate(row.messages):
        if message["role"] == "assistant" and not message["content"].strip() and index not in row.context:
            raise InvalidConversation(SILENT)
    return chat.examples(row.messages, row.where, row.context)


def _fit(examples: Sequence[Example], row: Record, seq: int) -> tuple[list[Example], bool]:
    """Cuts examples to seq + 1 tokens; returns those with a target left, and whether any target was
    cut off.
    """
    cut = [Example(each.tokens[: seq + 1], each.mask[: seq + 1], each.where, row.weight) for each in examples]
    # a target with a token before it
    fitting = [example for example in cut if example.mask[1:].any()]
    if not fitting:
        raise InvalidConversation(f"its first {seq} tokens hold nothing to train on")
    return fitting, count_targets(fitting) < count_targets(examples)


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


def _preference(row: Record, chat: ChatTokenizer, seq: int) -> tuple[Example, Example]:
    """Returns the examples of a preference: of the answer at the end, and of the rejected one."""
    assert isinstance(row, Conversation)
    assert row.rejected is not None
    chosen = _answer(row.messages, row.where, chat, seq)
    rejected = _answer((*row.messages[:-1], assistant_message(row.rejected)), row.where, chat, seq)
    if np.array_equal(chosen.tokens, rejected.tokens):  # templates may strip what texts differ by
        raise InvalidConversation("both answers are the same")
    return chosen, rejected


def _ratings(row: Record, chat: ChatTokenizer, seq: int) -> list[Rating]:
    assert isinstance(row, Conversation)
    if row.rejected is not None:
        good, bad = _preference(row, chat, seq)
        return [Rating(good, True), Rating(bad, False)]
    if row.label is None:
        raise UserError("`label` should be true for a good answer, or false for a bad one.")
    answer = _answer(row.messages, row.where, chat, seq)
    return [Rating(answer._replace(weight=row.weight), row.label)]

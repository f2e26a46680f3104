"""Tokenizes the rows of a dataset into training examples that fit a row of a batch; counts what was cut or dropped."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.format import quantity
from engine.text import OnProgress
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.conversations import Conversation, Preference, Record, Text
from engine.text.template import InvalidConversation

SILENT = "the assistant says nothing in one of its turns"


class Pair(NamedTuple):
    """A tokenized preference: the chosen and the rejected answer, each with its prompt. Only the answers are in the loss."""

    chosen: Example
    rejected: Example

    @property
    def where(self) -> str:
        return self.chosen.where


@dataclasses.dataclass
class DatasetSummary:
    """Counts the rows of a dataset that were used, and lists those truncated or dropped, each as (file:line, reason)."""

    rows: int = 0
    used: int = 0  # those whose end was cut off are among them
    truncated: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def describe(self) -> list[str]:
        """Returns lines for people: the counts, and for each reason the first row it was given for."""
        counts = f"{self.used:,} of {quantity(self.rows, 'row')} kept, {len(self.truncated):,} of them truncated"
        lines = [f"{counts}; {len(self.dropped):,} dropped"]
        for verb, rows in (("truncated", self.truncated), ("dropped", self.dropped)):
            reasons, first = Counter(reason for _, reason in rows), {reason: where for where, reason in reversed(rows)}
            lines += [f"{count:,} {verb}: {reason} ({first[reason]} first)" for reason, count in reasons.items()]
        return lines


def make_examples(
    rows: Iterable[Record], chat: ChatTokenizer, seq: int, report: OnProgress = None
) -> tuple[list[Any], DatasetSummary]:
    """Makes examples of at most seq + 1 tokens (seq inputs, and the target after each), or pairs of preferences.

    Cuts the end off a longer conversation, and a plain text into pieces, all in the loss from BOS to EOS. A conversation is
    dropped when no answer begins early enough or the template refuses it, and a preference when it is longer. Raises UserError,
    with file:line, when the template fails, and when nothing is left.
    """
    results: list[Any] = []
    summary, rows = DatasetSummary(), list(rows)
    for row in rows:
        summary.rows += 1
        try:
            parts, cut = ([_pair(row, chat, seq)], False) if isinstance(row, Preference) else _examples(row, chat, seq)
        except InvalidConversation as refusal:
            summary.dropped.append((row.where, str(refusal)))
            continue
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        summary.used += 1
        if cut:
            summary.truncated.append((row.where, f"longer than {seq} tokens, so its end is cut off"))
        results += parts
        if report:
            report(summary.rows, len(rows))
    if not results:
        if not summary.dropped:
            raise UserError("There is nothing in it to learn from.")
        where, reason = summary.dropped[0]
        raise UserError(f"None of {summary.rows:,} rows can be trained on; the first, {where}: {reason.rstrip('.')}.")
    return results, summary


def _examples(row: Conversation | Text, chat: ChatTokenizer, seq: int) -> tuple[list[Example], bool]:
    """Returns the examples of a row, and whether its end was cut off."""
    if row.weight == 0:
        raise InvalidConversation("its weight is 0")
    if isinstance(row, Text):
        ids = (chat.tokenizer.bos_ids, chat.tokenizer.encode(row.text), [chat.tokenizer.eos_id])
        tokens = np.concatenate(ids, dtype=np.int32, casting="unsafe")
        pieces = (tokens[at : at + seq + 1] for at in range(0, max(1, len(tokens) - 1), seq))
        examples = [Example(piece, np.ones(len(piece), bool), row.where) for piece in pieces]
    else:
        for index, message in enumerate(row.messages):
            if message["role"] == "assistant" and not message["content"].strip() and index not in row.context:
                raise InvalidConversation(SILENT)
        examples = chat.examples(row.messages, row.where, row.context)
    fitted = [Example(each.tokens[: seq + 1], each.mask[: seq + 1], each.where, row.weight) for each in examples]
    fitted = [example for example in fitted if example.mask[1:].any()]  # a target with a token before it
    if not fitted:
        raise InvalidConversation(f"its first {seq} tokens hold nothing to train on")
    return fitted, sum(len(example.tokens) for example in fitted) < sum(len(example.tokens) for example in examples)


def _pair(row: Preference, chat: ChatTokenizer, seq: int) -> Pair:
    answers = row.chosen, row.rejected
    if row.chosen == row.rejected:
        raise InvalidConversation("both answers are the same")
    if not all(answer.strip() for answer in answers):
        raise InvalidConversation(SILENT)
    pair = Pair(*(chat.answer_example([*row.messages, {"role": "assistant", "content": text}], row.where) for text in answers))
    if any(len(example.tokens) > seq + 1 for example in pair):
        raise InvalidConversation(f"longer than {seq} tokens")
    return pair

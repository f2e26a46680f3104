"""Tokenizes the rows of a dataset into training examples that fit a row of a batch; counts what was cut or dropped."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.text import OnProgress
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.conversations import Preference, Record, Text
from engine.text.template import InvalidConversation

SILENT = "the assistant says nothing in one of its turns"


class Pair(NamedTuple):
    """A tokenized preference: the chosen and the rejected answer, each with its prompt. Only the answers are in the loss."""

    chosen: Example
    rejected: Example


@dataclasses.dataclass
class DatasetSummary:
    """Counts the rows of a dataset that were used, and lists those truncated or dropped, each as (file:line, reason)."""

    rows: int = 0
    used: int = 0  # those whose end was cut off are among them
    truncated: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def describe(self) -> list[str]:
        """Returns lines for people: the counts, and for each reason the first row it was given for."""
        counts = f"{self.used:,} of {self.rows:,} kept, {len(self.truncated):,} of them truncated"
        lines = [f"{counts}; {len(self.dropped):,} dropped"]
        for verb, rows in (("truncated", self.truncated), ("dropped", self.dropped)):
            reasons, first = Counter(reason for _, reason in rows), {reason: where for where, reason in reversed(rows)}
            lines += [f"{count:,} {verb}: {reason} ({first[reason]} first)" for reason, count in reasons.items()]
        return lines


def make_examples(
    rows: Iterable[Record], chat: ChatTokenizer, seq: int, *, bos_ids: Sequence[int] = (), report: OnProgress = None
) -> tuple[list[Example], DatasetSummary]:
    """Makes examples of at most seq + 1 tokens: cuts the end off a longer conversation, and a plain text into pieces.

    That is seq inputs, and the target after each. A conversation is dropped when no answer begins early enough, or when
    the template refuses it. The pieces of a text are all in the loss, from `bos_ids` to the EOS. Raises UserError, with
    file:line, when the template fails, when nothing is left, and for a preference.
    """

    def build(row: Record) -> tuple[list[Example], bool]:
        if isinstance(row, Preference):
            raise UserError("it holds two answers to choose between; that is data for preferences, not for examples.")
        if row.weight == 0:
            raise InvalidConversation("its weight is 0")
        if isinstance(row, Text):
            text = chat.tokenizer.encode(row.text)
            tokens = np.concatenate((bos_ids, text, [chat.tokenizer.eos_id]), dtype=np.int32, casting="unsafe")
            pieces = (tokens[at : at + seq + 1] for at in range(0, max(1, len(tokens) - 1), seq))
            examples = [Example(piece, np.ones(len(piece), bool), row.where) for piece in pieces]
        elif any(
            message["role"] == "assistant" and not message["content"].strip() and index not in row.context
            for index, message in enumerate(row.messages)
        ):
            raise InvalidConversation(SILENT)
        else:
            examples = chat.examples(row.messages, row.where, row.context)
        fitted = [Example(each.tokens[: seq + 1], each.mask[: seq + 1], each.where, row.weight) for each in examples]
        fitted = [example for example in fitted if example.mask[1:].any()]  # a target with a token before it
        if not fitted:
            raise InvalidConversation(f"its first {seq} tokens hold nothing to train on")
        return fitted, sum(len(example.tokens) for example in fitted) < sum(len(example.tokens) for example in examples)

    return _build_all(rows, build, seq, report)


def make_pairs(
    rows: Iterable[Record], chat: ChatTokenizer, seq: int, report: OnProgress = None
) -> tuple[list[Pair], DatasetSummary]:
    """Makes pairs of examples of at most seq + 1 tokens, with only the answers in the loss; drops longer ones.

    Raises UserError as `make_examples`, and for rows that are no preference.
    """

    def build(row: Record) -> tuple[list[Pair], bool]:
        if not isinstance(row, Preference):
            raise UserError("it holds no pair of answers; preferences need `prompt`, `chosen` and `rejected`.")
        if row.chosen == row.rejected:
            raise InvalidConversation("both answers are the same")
        if not (row.chosen.strip() and row.rejected.strip()):
            raise InvalidConversation(SILENT)
        turns = ({"role": "assistant", "content": answer} for answer in (row.chosen, row.rejected))
        pair = Pair(*(chat.answer_example([*row.prompt, turn], row.where) for turn in turns))
        if any(len(example.tokens) > seq + 1 for example in pair):
            raise InvalidConversation(f"longer than {seq} tokens")
        return [pair], False

    return _build_all(rows, build, seq, report)


def _build_all[T](
    rows: Iterable[Record], build: Callable[[Record], tuple[list[T], bool]], seq: int, report: OnProgress
) -> tuple[list[T], DatasetSummary]:
    """Returns the items that `build` makes of the rows, and a summary; `build` also tells whether it cut a row's end off."""
    results: list[T] = []
    summary, rows = DatasetSummary(), list(rows)
    for row in rows:
        summary.rows += 1
        try:
            parts, cut = build(row)
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

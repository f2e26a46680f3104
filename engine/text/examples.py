"""Training examples from conversations: tokens that fit into a row of a batch, and an account of what was cut or dropped."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.text.chat import Chat, Example
from engine.text.conversations import Conversation, Preference, Text
from engine.text.template import Message, Refusal

CUT = "longer than {seq} tokens, so its end is cut off"
NO_ROOM = "nothing that is to be learnt lies in its first {seq} tokens"
TOO_LONG = "longer than {seq} tokens"
SILENT = "the assistant says nothing in one of its turns"
SAME = "both answers are the same"


class Pair(NamedTuple):
    """Two answers to one prompt, the first to be preferred. Only the answers count."""

    chosen: Example
    rejected: Example


@dataclasses.dataclass
class DatasetSummary:
    """The account of a data set: how many rows were used, cut and dropped, and why. Lists are of (file:line, reason)."""

    rows: int = 0
    used: int = 0  # of the rows; those whose end was cut off are among them
    examples: int = 0
    truncated: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def describe(self) -> list[str]:
        """Returns lines for people: how many were kept, cut and left out, and for each reason where it first was one."""
        counts = (
            f"{self.used:,} of {self.rows:,} kept, {len(self.truncated):,} of them truncated; {len(self.dropped):,} dropped"
        )
        lines = [counts]
        for verb, rows in (("truncated", self.truncated), ("dropped", self.dropped)):
            reasons: dict[str, list[str]] = {}
            for where, reason in rows:
                reasons.setdefault(reason, []).append(where)
            lines += [f"{len(places):,} {verb}: {reason} ({places[0]} first)" for reason, places in reasons.items()]
        return lines


def make_examples(
    conversations: Iterable[Conversation | Text | Preference],
    chat: Chat,
    seq: int,
    *,
    start: Sequence[int] = (),
    report: Callable[[int, int], None] | None = None,
) -> tuple[list[Example], DatasetSummary]:
    """Returns the training examples in order, each of at most seq + 1 tokens: seq are read, and the one after each predicted.

    A conversation that is longer loses its end, and is left out when no answer begins early enough. A plain text is cut
    into pieces that are all learnt, `start` (what the model has before any text) at its beginning and the end of text at
    its end. What the template refuses is left out. Raises UserError, with file:line, when the template fails, when
    nothing is left, and for a choice between answers.
    """
    examples: list[Example] = []
    summary = DatasetSummary()
    rows = list(conversations)
    for done, row in enumerate(rows):
        summary.rows += 1
        try:
            parts = _examples(row, chat, seq, start)
        except Refusal as refused:
            summary.dropped.append((row.where, str(refused)))
            continue
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        fitting = [_fitted(example, seq) for example in parts]
        useful = [example for example in fitting if example is not None]
        if not useful:
            summary.dropped.append((row.where, NO_ROOM.format(seq=seq)))
            continue
        summary.used += 1
        if any(part is None or len(part.tokens) < len(whole.tokens) for whole, part in zip(parts, fitting)):
            summary.truncated.append((row.where, CUT.format(seq=seq)))
        examples += useful
        if report:
            report(done + 1, len(rows))
    summary.examples = len(examples)
    _refuse_nothing(examples, summary)
    return examples, summary


def make_pairs(
    choices: Iterable[Conversation | Text | Preference], chat: Chat, seq: int, report: Callable[[int, int], None] | None = None
) -> tuple[list[Pair], DatasetSummary]:
    """Returns pairs of examples of at most seq + 1 tokens, in which only the answers count. What is longer is left out.

    Raises UserError as `make_examples`, and for rows without a choice.
    """
    pairs: list[Pair] = []
    summary = DatasetSummary()
    rows = list(choices)
    for done, row in enumerate(rows):
        if not isinstance(row, Preference):
            raise UserError(f"{row.where} holds no pair of answers; preferences need `prompt`, `chosen` and `rejected`.")
        summary.rows += 1
        try:
            if row.chosen == row.rejected:
                raise Refusal(SAME)
            pair = Pair(*(_answered(row.prompt, text, chat, row.where) for text in (row.chosen, row.rejected)))
            if max(len(pair.chosen.tokens), len(pair.rejected.tokens)) > seq + 1:
                raise Refusal(TOO_LONG.format(seq=seq))
        except Refusal as refused:
            summary.dropped.append((row.where, str(refused)))
            continue
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        pairs.append(pair)
        if report:
            report(done + 1, len(rows))
    summary.used = summary.examples = len(pairs)
    _refuse_nothing(pairs, summary)
    return pairs, summary


def _examples(row: Conversation | Text | Preference, chat: Chat, seq: int, start: Sequence[int]) -> list[Example]:
    if isinstance(row, Preference):
        raise UserError("it holds two answers to choose between; that is data for preferences, not for examples.")
    if isinstance(row, Text):
        tokens = np.concatenate([np.array(start, np.int32), chat.tokenizer.encode(row.text), [chat.tokenizer.end]]).astype(
            np.int32
        )
        pieces = (tokens[at : at + seq + 1] for at in range(0, max(1, len(tokens) - 1), seq))
        return [Example(piece, np.ones(len(piece), bool), row.where) for piece in pieces]
    if any(message["role"] == "assistant" and not message["content"].strip() for message in row.messages):
        raise Refusal(SILENT)
    return chat.examples(row.messages, row.where)


def _answered(prompt: Sequence[Message], answer: str, chat: Chat, where: str) -> Example:
    if not answer.strip():
        raise Refusal(SILENT)
    return chat.answer([*prompt, {"role": "assistant", "content": answer}], where)


def _fitted(example: Example, seq: int) -> Example | None:
    """Returns at most seq + 1 tokens of it; None when none of them is both a target and preceded by another."""
    tokens, mask = example.tokens[: seq + 1], example.mask[: seq + 1]
    return Example(tokens, mask, example.where) if mask[1:].any() else None


def _refuse_nothing(examples: Sequence[object], summary: DatasetSummary) -> None:
    if examples:
        return
    if not summary.dropped:
        raise UserError("There is nothing in it to learn from.")
    where, reason = summary.dropped[0]
    raise UserError(f"None of {summary.rows:,} rows can be learnt from; the first, {where}: {reason.rstrip('.')}.")

"""Conversation data: reads and tokenizes the examples that `--data` and `--validation` name."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental.multihost_utils import process_allgather

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.storage.model_loader import LoadedModel
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.conversations import SHIPPED, Conversations, Preference, Text, read_conversations
from engine.text.corpus import normalize
from engine.text.examples import DatasetSummary, Pair, make_examples, make_pairs
from engine.text.packing import PairBatch, evaluation_pairs
from engine.text.template import Message
from engine.training.preference import Preferences, margins
from stages.cli.console import Console, ReportProgress

HELD_OUT = 0.1
EVALUATION_ROWS = 2  # scored together
QUESTIONS = 3  # of the held-out set, or for texts these
QUESTIONS_BESIDE_TEXTS = ("What should I do when I cannot sleep?", "How do I boil an egg?", "Why is the sea salty?")


@dataclasses.dataclass(frozen=True)
class ConversationData:
    """Training and held-out examples (or pairs), their names, and a summary of the rows used and left out.

    No held-out row is a copy of a training row (of a preference: has its prompt); `overlap` says what was done for that, if
    anything.
    `questions`: QUESTIONS conversations of the held-out set, each up to the assistant's first answer.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    summary: DatasetSummary
    kind: str
    name: str
    held_out_name: str
    overlap: str
    questions: Sequence[Sequence[Message]]

    @property
    def first(self) -> Example:
        item = self.train[0]
        return item.chosen if isinstance(item, Pair) else item


def digest_examples(items: Sequence[Any]) -> str:
    """Returns the SHA-256 of all tokens, masks and weights of examples or pairs."""
    hasher = hashlib.sha256()
    for item in items:
        for example in item if isinstance(item, Pair) else (item,):
            hasher.update(len(example.tokens).to_bytes(8, "little"))
            hasher.update(np.asarray(example.tokens, "<i4").tobytes() + np.asarray(example.mask, bool).tobytes())
            hasher.update(f"{example.weight}".encode() if example.weight != 1 else b"")  # without weights as ever
    return hasher.hexdigest()


def prepare_conversations(
    data: str, validation: str | None, objective: str, seq: int, seed: int, model: LoadedModel, chat: ChatTokenizer,
    console: Console,
) -> ConversationData:  # fmt: skip
    """Reads and tokenizes examples of at most `seq` tokens. Raises UserError for data that the objective cannot use.

    Without `validation` a tenth of the rows, chosen by `seed`, is held out.
    """
    conversations = source = _read(data, objective)
    with console.task(f"reading {data}") as report:
        train, summary = tokenize_examples(conversations, model, chat, seq, report)
    texts = _texts(conversations)
    validation = validation or (f"{data}-held-out" if f"{data}-held-out" in SHIPPED else None)
    if validation:
        source = _read(validation, objective)
        held_out, _ = tokenize_examples(source, model, chat, seq)
        held_out, overlap = _without_copies(held_out, _texts(source), {texts[_where(item)] for item in train}, validation, data)
    else:
        train, held_out, validation, overlap = _split(train, texts, seed, data)
    questions = _questions(source, held_out)
    return ConversationData(train, held_out, summary, conversations.kind, data, validation, overlap, questions)


def _where(item: Any) -> str:
    return (item.chosen if isinstance(item, Pair) else item).where


def _texts(conversations: Conversations) -> dict[str, str]:
    """Returns the text of each row by which it is a copy of another: of a preference its prompt, else all of it."""

    def text(row: Any) -> str:
        messages = row.prompt if isinstance(row, Preference) else row.messages
        return "\n".join(message["content"] for message in messages)

    return {row.where: row.text if isinstance(row, Text) else text(row) for row in conversations}


def _without_copies(
    held_out: Sequence[Any], texts: dict[str, str], train: set[str], name: str, data: str
) -> tuple[Sequence[Any], str]:
    """Returns the held-out items whose rows are not in `train`, and what was left out. Raises UserError if nothing is left."""
    rows = {where: normalize(texts[where]) for where in map(_where, held_out)}
    trained = {*map(normalize, train)}
    copies = {where for where, text in rows.items() if text in trained}
    if not copies:
        return held_out, ""
    exact = sum(texts[where] in train for where in copies)
    found = f"{len(copies):,} of the {len(rows):,} rows of {name} are in {data} too, {exact:,} of them to the letter"
    if len(copies) == len(rows):
        raise UserError(f"{found}: nothing is held out. Give another --validation, or none, to hold out a tenth of {data}.")
    return [item for item in held_out if _where(item) not in copies], f"{found}: left out"


def _split(items: Sequence[Any], texts: dict[str, str], seed: int, data: str) -> tuple[Sequence[Any], Sequence[Any], str, str]:
    """Returns the training and the held-out items, the latter's name, and what is said of copies.

    All copies of a row are on one side, and rows that have none are held out first. Which, is by a hash of seed and text, so
    that a row more or less in the file changes no other's side. Of a single text the end is held out.
    """
    groups: dict[str, list[str]] = {}
    for where in dict.fromkeys(map(_where, items)):
        groups.setdefault(normalize(texts[where]), []).append(where)
    rows = sum(map(len, groups.values()))
    if rows == 1 < len(items):
        count = max(1, round(HELD_OUT * len(items)))
        return items[:-count], items[-count:], f"the last {count:,} of {len(items):,} pieces of {data}", ""
    if len(groups) < 2:
        raise UserError(
            f"{data} has {rows:,} usable rows, {len(groups)} of them different: too few to hold any out; give others with "
            "--validation."
        )
    rank = lambda text: (len(groups[text]), hashlib.sha256(f"{seed} {text}".encode()).digest())
    held_out = set[str]()
    for text in sorted(groups, key=rank)[:-1]:
        held_out.update(groups[text])
        if len(held_out) >= round(HELD_OUT * rows):
            break
    copies = rows - len(groups)
    said = f"{copies:,} of {rows:,} rows are copies of another; all copies of a row are on one side" if copies else ""
    train, rest = ([item for item in items if (_where(item) in held_out) == side] for side in (False, True))
    return train, rest, f"{len(held_out):,} of {rows:,} rows of {data}, by the seed", said


def _questions(source: Conversations, held_out: Sequence[Any]) -> Sequence[Sequence[Message]]:
    """Returns QUESTIONS conversations of the held-out examples, evenly spaced, each up to the assistant's first answer."""
    lines = [*dict.fromkeys(map(_where, held_out))]
    chosen = {lines[at * len(lines) // QUESTIONS] for at in range(QUESTIONS)}
    questions = []
    for row in source:
        if isinstance(row, Text):
            return [[{"role": "user", "content": question}] for question in QUESTIONS_BESIDE_TEXTS]
        if row.where in chosen:
            messages = row.prompt if isinstance(row, Preference) else row.messages
            questions.append([*itertools.takewhile(lambda message: message["role"] != "assistant", messages)])
    return questions


def _read(data: str, objective: str) -> Conversations:
    conversations = read_conversations(data)
    is_preference = objective == "preference"
    if (conversations.kind == "preference") != is_preference:
        wanted, remedy = (
            ("pairs of a chosen and a rejected answer", "answers fits it, or give other --data such as voice-preferences")
            if is_preference else ("conversations or texts", "preference fits it")
        )  # fmt: skip
        raise UserError(f"{data} holds {conversations.kind} data, and this objective trains on {wanted}; --objective {remedy}.")
    return conversations


def tokenize_examples(
    conversations: Conversations, model: LoadedModel, chat: ChatTokenizer, seq: int, report: ReportProgress | None = None
) -> tuple[Sequence[Any], DatasetSummary]:
    """Returns examples or pairs, and a summary of the rows. Raises UserError when none is left."""
    if conversations.kind == "preference":
        return make_pairs(conversations, chat, seq, report=report)
    return make_examples(conversations, chat, seq, bos_ids=model.tokenizer.bos_ids, report=report)


def pair_margins(
    cfg: ModelConfig, params: Any, pairs: Sequence[Pair], seq: int, rows: int
) -> Iterator[tuple[PairBatch, np.ndarray]]:
    """Yields batches of `rows` pairs in order, each with its margins (rows,) by a model; rows behind the last are padding."""
    for part in evaluation_pairs(pairs, seq, rows):
        yield part, process_allgather(margins(cfg, params, Preferences(part.chosen, part.rejected)), tiled=True)

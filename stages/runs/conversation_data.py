"""Conversation data: reads and tokenizes the examples that `--data` and `--validation` name, and evaluates on them."""

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from engine.errors import UserError
from engine.format import quantity
from engine.mesh.layout import row_shards
from engine.model.config import ModelConfig
from engine.model.loss import score
from engine.model.paths import merge
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.conversations import SHIPPED, Conversations, Record, Text, read_conversations
from engine.text.corpus import normalize
from engine.text.examples import DatasetSummary, Pair, PairBatch, evaluation_batches, evaluation_pairs, make_examples
from engine.text.template import Message
from engine.training.preference import Preferences, margins
from engine.training.step import NEXT_TOKEN, Objective
from stages.cli.console import Console
from stages.runs.text_data import EVALUATION_ROWS, Evaluator

HELD_OUT = 0.1
QUESTIONS = 3  # of the held-out set, or for texts these
QUESTIONS_BESIDE_TEXTS = ("What should I do when I cannot sleep?", "How do I boil an egg?", "Why is the sea salty?")


@dataclasses.dataclass(frozen=True)
class ConversationData:
    """Training and held-out examples (or pairs), their names, and a summary of the rows used and left out.

    No held-out row is a copy of a training row (of a preference: has its prompt); `overlap` says what was done for that, if
    anything.
    `questions`: QUESTIONS conversations of the held-out set, each up to the assistant's first answer.
    """

    train: list[Any]
    held_out: list[Any]
    summary: DatasetSummary
    kind: str
    name: str
    held_out_name: str
    overlap: str
    questions: Sequence[Sequence[Message]]


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
    data: str, validation: str | None, objective: str, seq: int, seed: int, chat: ChatTokenizer, console: Console
) -> ConversationData:
    """Reads and tokenizes examples of at most `seq` tokens. Raises UserError for data that the objective cannot use.

    Without `validation` a tenth of the rows, chosen by `seed`, is held out.
    """
    conversations = open_conversations(data, objective)
    with console.task(f"reading {data}") as report:
        train, summary = make_examples(conversations, chat, seq, report)
    rows = _rows_of(train, conversations)
    validation = validation or (f"{data}-held-out" if f"{data}-held-out" in SHIPPED else None)
    if validation:
        source = open_conversations(validation, objective)
        held_out, _ = make_examples(source, chat, seq)
        texts, rows = {row.text for row in rows.values()}, _rows_of(held_out, source)
        held_out, overlap = _without_copies(held_out, rows, texts, validation, data)
    else:
        train, held_out, validation, overlap = _split(train, rows, seed, data)
    questions = _questions([rows[where] for where in dict.fromkeys(item.where for item in held_out)])
    return ConversationData(train, held_out, summary, conversations.kind, data, validation, overlap, questions)


def _rows_of(items: list[Any], source: Conversations) -> dict[str, Record]:
    """Returns the rows, by file:line, that the items were made of."""
    used = {item.where for item in items}
    return {row.where: row for row in source if row.where in used}


def _without_copies(
    held_out: list[Any], rows: dict[str, Record], train: set[str], name: str, data: str
) -> tuple[list[Any], str]:
    """Returns the held-out items whose texts are not in `train`, and what was left out. Raises UserError if nothing is left."""
    known = {*map(normalize, train)}
    copies = {where: row.text for where, row in rows.items() if normalize(row.text) in known}
    if not copies:
        return held_out, ""
    exact = sum(text in train for text in copies.values())
    found = f"{len(copies):,} of the {len(rows):,} rows of {name} are in {data} too, {exact:,} of them to the letter"
    if len(copies) == len(rows):
        raise UserError(f"{found}: nothing is held out. Give another --validation, or none, to hold out a tenth of {data}.")
    return [item for item in held_out if item.where not in copies], f"{found}: left out"


def _split(items: list[Any], rows: dict[str, Record], seed: int, data: str) -> tuple[list[Any], list[Any], str, str]:
    """Returns the training and the held-out items, the latter's name, and what is said of copies.

    All copies of a row are on one side, and rows that have none are held out first. Which, is by a hash of seed and text, so
    that a row more or less in the file changes no other's side. Of a single text the end is held out.
    """
    if len(rows) == 1 < len(items):
        count = max(1, round(HELD_OUT * len(items)))
        return items[:-count], items[-count:], f"the last {count:,} of {len(items):,} pieces of {data}", ""
    groups = collections.defaultdict[str, list[str]](list)
    for where, row in rows.items():
        groups[normalize(row.text)].append(where)
    if len(groups) < 2:
        raise UserError(
            f"{data} has {quantity(len(rows), 'usable row')}{', 1 of them different' * (len(rows) > 1)}: too few to hold any "
            "out; give others with --validation."
        )
    rank = lambda text: (len(groups[text]), hashlib.sha256(f"{seed} {text}".encode()).digest())
    held_out = set[str]()
    for text in sorted(groups, key=rank)[:-1]:
        held_out.update(groups[text])
        if len(held_out) >= round(HELD_OUT * len(rows)):
            break
    copies = f"{len(rows) - len(groups):,} of {len(rows):,} rows are copies of another; all copies of a row are on one side"
    train, rest = ([item for item in items if (item.where in held_out) == side] for side in (False, True))
    name = f"{len(held_out):,} of {len(rows):,} rows of {data}, by the seed"
    return train, rest, name, copies * (len(groups) < len(rows))


def _questions(rows: Sequence[Record]) -> Sequence[Sequence[Message]]:
    """Returns QUESTIONS conversations, evenly spaced among the rows, each up to the assistant's first answer."""
    chosen = [rows[at] for at in dict.fromkeys(at * len(rows) // QUESTIONS for at in range(QUESTIONS))]
    if any(isinstance(row, Text) for row in chosen):
        return [[{"role": "user", "content": question}] for question in QUESTIONS_BESIDE_TEXTS]
    is_asked = lambda message: message["role"] != "assistant"
    return [[*itertools.takewhile(is_asked, row.messages)] for row in chosen if not isinstance(row, Text)]


def open_conversations(data: str, objective: str) -> Conversations:
    """Opens a data set, of which it reads the first row. Raises UserError for one that the objective cannot use."""
    conversations = read_conversations(data)
    is_preference = objective == "preference"
    if (conversations.kind == "preference") != is_preference:
        wanted, remedy = (
            ("pairs of a chosen and a rejected answer", "answers fits it, or give other --data such as voice-preferences")
            if is_preference else ("conversations or texts", "preference fits it")
        )  # fmt: skip
        raise UserError(f"{data} holds {conversations.kind} data, and this objective trains on {wanted}; --objective {remedy}.")
    return conversations


def pair_margins(
    cfg: ModelConfig, params: Any, pairs: Sequence[Pair], seq: int, rows: int
) -> Iterator[tuple[PairBatch, np.ndarray]]:
    """Yields batches of `rows` pairs in order, each with its margins (rows,) by a model; rows behind the last are padding.

    Without `params` margins are 0, for a loss that reads none.
    """
    for part in evaluation_pairs(pairs, seq, rows):
        if params is None:
            yield part, np.zeros(rows, np.float32)
        else:
            yield part, process_allgather(margins(cfg, params, Preferences(part.chosen, part.rejected)), tiled=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summed(objective: Objective, cfg: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return objective.summed_loss(cfg, params, batch)


def held_out_evaluator(
    cfg: ModelConfig, frozen: Any, initial: Any, examples: Sequence[Any], objective: Objective, seq: int
) -> Evaluator:
    """Returns the evaluator on held-out examples (mean nats of a completion's token) or pairs (mean preference loss).

    `initial`: the params before training, for a loss that has a reference. On a mesh its devices share the rows,
    EVALUATION_ROWS each.
    """
    rows = EVALUATION_ROWS * row_shards()
    batches: Sequence[Any]
    summed: Callable[..., Any]
    if objective is NEXT_TOKEN:
        batches, unit, key = list(evaluation_batches(examples, seq, rows)), "nats/token", "val_nats_per_token"
        summed, size = score, max(sum(int(batch.mask.sum()) for batch in batches), 1)
    else:
        batches = [
            Preferences(part.chosen, part.rejected, reference)
            for part, reference in pair_margins(cfg, initial, examples, seq, rows)
        ]
        unit, key, summed, size = "preference loss", "val_preference_loss", functools.partial(_summed, objective), len(examples)
    return Evaluator(batches, lambda trainable, batch: summed(cfg, merge(trainable, frozen), batch), size, unit, key)

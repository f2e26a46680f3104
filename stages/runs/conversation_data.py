"""Conversation data: reads and tokenizes what `--data` and `--validation` name, and evaluates on it."""

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from engine.errors import UserError
from engine.format import quantity
from engine.mesh.layout import row_shards
from engine.model.config import ModelConfig
from engine.model.loss import score
from engine.model.paths import merge
from engine.text import OnProgress
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.conversations import (
    KINDS,
    SHIPPED,
    Conversation,
    Conversations,
    Record,
    Text,
    read_conversations,
)
from engine.text.corpus import normalize
from engine.text.examples import (
    Dataset,
    Pair,
    RatedPair,
    Rating,
    make_examples,
    make_pairs,
    make_ratings,
    make_whole_examples,
    mismatch,
)
from engine.text.packing import evaluation_batches
from engine.text.template import Message
from engine.training.preference import pair_logprobs, preference_batch
from engine.training.step import NEXT_TOKEN, Objective
from stages.cli.console import Console
from stages.runs.text_evaluators import EVALUATION_ROWS, Evaluator

HELD_OUT = 0.1  # share of the rows, where no --validation is given
QUESTIONS = 3  # held-out conversations whose first questions a model is asked before and after
# Plain texts have no questions: beside them a model is asked these.
QUESTIONS_BESIDE_TEXTS = (
    "What should I do when I cannot sleep?",
    "How do I boil an egg?",
    "Why is the sea salty?",
)

UsedRows = list[tuple[Record, list[Any]]]  # rows, with their examples


class Wanted(NamedTuple):
    """The data that an objective trains on."""

    kinds: set[str]  # of KINDS
    description: str
    remedy: str  # for data of another kind


PAIRS = "pairs of a chosen and a rejected answer"
WANTED = {  # by objective
    "answers": Wanted(
        kinds=KINDS.keys() - {"preference"},
        description="conversations or texts",
        remedy="--objective preference fits it.",
    ),
    "preference": Wanted(
        kinds={"preference"},
        description=PAIRS,
        remedy="--objective answers fits it, or give other --data such as voice-preferences.",
    ),
    "kto": Wanted(
        kinds={"preference", "prompt/completion"},
        description=f"{PAIRS}, or prompt, completion and label",
        remedy="--objective answers fits it.",
    ),
}


@dataclasses.dataclass(frozen=True)
class ConversationData:
    """Training and held-out examples, or pairs. No held-out row copies a training row, or has its
    prompt if a preference."""

    train: list[Any]
    held_out: list[Any]
    digest: str
    held_out_digest: str
    summary: list[str]  # lines on the rows used and left out
    kind: str  # of KINDS
    name: str
    held_out_name: str
    overlap: str  # a sentence on rows that are copies, or ""
    # The beginnings of QUESTIONS held-out conversations: all before the assistant's first answer.
    questions: Sequence[Sequence[Message]]
    references: Sequence[Sequence[Message]]  # `references_of` the held-out rows
    train_references: Sequence[Sequence[Message]]  # `references_of` the training rows


def digest_examples(items: Sequence[Example | Pair | Rating]) -> str:
    hasher = hashlib.sha256()
    for item in items:
        if isinstance(item, Pair):
            _digest_example(hasher, item.answer, item.answer.weight)
            _digest_example(hasher, item.other, item.other.weight)
        elif isinstance(item, Rating):
            _digest_example(hasher, item.answer, item.value)
        else:
            _digest_example(hasher, item, item.weight)
    return hasher.hexdigest()


def _digest_example(hasher: Any, example: Example, weight: float) -> None:
    hasher.update(len(example.tokens).to_bytes(8, "little"))
    hasher.update(np.asarray(example.tokens, "<i4").tobytes())
    hasher.update(np.asarray(example.mask, bool).tobytes())
    if weight != 1:  # data without weights have the digest that they always had
        hasher.update(f"{weight}".encode())


def prepare_conversations(
    data: str,
    validation: str | None,
    objective: str,
    seq: int,
    seed: int,
    chat: ChatTokenizer,
    console: Console,
    full: bool = False,
) -> ConversationData:
    """Reads and tokenizes examples of at most `seq` tokens. Raises UserError for data that the
    objective cannot use.

    `objective`: one of WANTED; kto has pairs as of `mismatch`. `full`: all of a conversation is in
    the loss. Without `validation` a tenth of the rows, chosen by `seed`, is held out.
    """
    if full:
        make = make_whole_examples
    else:
        make = {"answers": make_examples, "preference": make_pairs, "kto": make_ratings}[objective]

    def read(name: str) -> tuple[str, Dataset]:
        source = open_conversations(name, objective)
        with console.task(f"reading {name}") as report:
            return source.kind, make(source, chat, seq, report)

    kind, dataset = read(data)
    if validation is None and f"{data}-held-out" in SHIPPED:
        validation = f"{data}-held-out"
    if validation:
        _, validation_set = read(validation)
        split = _without_copies(validation_set.used, dataset.used, validation, data)
    else:
        split = _split(dataset.used, seed, data)
    train = _items(split.train_rows)
    held_out = _items(split.held_out_rows)
    digest = digest_examples(train)
    held_out_digest = digest_examples(held_out)
    if objective == "kto":
        train = mismatch(train, seq)
        held_out = mismatch(held_out, seq)
    train_records = [record for record, _ in split.train_rows]
    held_out_records = [record for record, _ in split.held_out_rows]
    return ConversationData(
        train=train,
        held_out=held_out,
        digest=digest,
        held_out_digest=held_out_digest,
        summary=dataset.describe(),
        kind=kind,
        name=data,
        held_out_name=split.held_out_name,
        overlap=split.overlap,
        questions=_questions(held_out_records),
        references=references_of(held_out_records),
        train_references=references_of(train_records),
    )


def _items(rows: UsedRows) -> list[Any]:
    items = []
    for _, of_row in rows:
        items += of_row
    return items


class Split(NamedTuple):
    train_rows: UsedRows
    held_out_rows: UsedRows
    held_out_name: str
    overlap: str  # a sentence on rows that are copies, or ""


def _without_copies(held_out: UsedRows, train: UsedRows, name: str, data: str) -> Split:
    """Leaves out the held-out rows whose texts are in `train` too. Raises UserError if all are."""
    texts = {row.text for row, _ in train}
    known = {*map(normalize, texts)}
    others = [(row, items) for row, items in held_out if normalize(row.text) not in known]
    count = len(held_out) - len(others)
    if not count:
        return Split(train, held_out, name, overlap="")
    exact = sum(row.text in texts for row, _ in held_out)
    overlap = (
        f"{count:,} of the {len(held_out):,} rows of {name} are in {data} too, "
        f"{exact:,} of them to the letter"
    )
    if not others:
        raise UserError(
            f"{overlap}: nothing is held out. "
            f"Give another --validation, or none, to hold out a tenth of {data}."
        )
    return Split(train, others, name, overlap=f"{overlap}: left out")


def _split(used: UsedRows, seed: int, data: str) -> Split:
    """Holds out about HELD_OUT of the rows, or the end of a single text. Raises UserError for too few.

    All copies of a row are on one side, and rows without a copy are held out first. A hash of seed
    and text chooses them, so that a row more in the file moves no other.
    """
    row, items = used[0]
    rows = len(used)
    if rows == 1 and len(items) > 1:
        count = max(1, round(HELD_OUT * len(items)))
        return Split(
            train_rows=[(row, items[:-count])],
            held_out_rows=[(row, items[-count:])],
            held_out_name=f"the last {count:,} of {len(items):,} pieces of {data}",
            overlap="",
        )
    copies = collections.Counter(normalize(row.text) for row, _ in used)
    if len(copies) < 2:
        different = ""
        if rows > 1:
            different = ", 1 of them different"
        raise UserError(
            f"{data} has {quantity(rows, 'usable row')}{different}: "
            "too few to hold any out; give others with --validation."
        )

    def rank(text: str) -> tuple[int, bytes]:
        return copies[text], hashlib.sha256(f"{seed} {text}".encode()).digest()

    rows_to_hold_out = round(HELD_OUT * rows)
    held_out_texts = set()
    count = 0
    for text in sorted(copies, key=rank)[:-1]:  # one text at least stays for training
        held_out_texts.add(text)
        count += copies[text]
        if count >= rows_to_hold_out:
            break
    train_rows: UsedRows = []
    held_out_rows: UsedRows = []
    for row, items in used:
        if normalize(row.text) in held_out_texts:
            held_out_rows.append((row, items))
        else:
            train_rows.append((row, items))
    overlap = ""
    if len(copies) < rows:
        overlap = f"{rows - len(copies):,} of {rows:,} rows are copies of another; all copies of a row are on one side"
    name = f"{count:,} of {rows:,} rows of {data}, by the seed"
    return Split(train_rows, held_out_rows, name, overlap)


def _questions(rows: Sequence[Record]) -> Sequence[Sequence[Message]]:
    """Returns the messages before the assistant's first answer, of QUESTIONS rows at equal distances or of
    all rows if there are fewer; QUESTIONS_BESIDE_TEXTS if one is a text.
    """
    questions = []
    count = min(QUESTIONS, len(rows))
    for number in range(count):
        row = rows[number * len(rows) // count]
        if isinstance(row, Text):
            return [[{"role": "user", "content": question}] for question in QUESTIONS_BESIDE_TEXTS]
        before_answer = itertools.takewhile(lambda message: message["role"] != "assistant", row.messages)
        questions.append([*before_answer])
    return questions


def references_of(rows: Iterable[Record]) -> list[Sequence[Message]]:
    """Returns each conversation up to and with its last answer; of a preference that is the chosen one.

    Leaves out texts, conversations without an answer, and answers that are labelled bad.
    """
    references: list[Sequence[Message]] = []
    for row in rows:
        if not isinstance(row, Conversation) or row.label is False:
            continue
        ends = [at for at, message in enumerate(row.messages) if at and message["role"] == "assistant"]
        if ends:
            references.append(row.messages[: ends[-1] + 1])
    return references


def open_conversations(data: str, objective: str) -> Conversations:
    """Opens a data set. Raises UserError for one that the objective cannot use."""
    conversations = read_conversations(data)
    wanted = WANTED[objective]
    if conversations.kind in wanted.kinds:
        return conversations
    raise UserError(
        f"{data} holds {conversations.kind} data, and this objective trains on {wanted.description}; "
        f"{wanted.remedy}"
    )


def reference_logprobs(
    cfg: ModelConfig,
    params: Any,
    pairs: Sequence[Pair | RatedPair],
    seq: int,
    rows: int,
    report: OnProgress = None,
) -> np.ndarray:
    """Returns both answers' log-probabilities (pairs, 2) by a model, which is given `rows` pairs at
    once. They are 0 without `params`."""
    logprobs = np.zeros((len(pairs), 2), np.float32)
    if not params:
        return logprobs
    for first in range(0, len(pairs), rows):
        if report:  # first, because the first batch may compile for a minute
            report(first, len(pairs))
        batch = preference_batch(pairs, range(first, first + rows), seq, logprobs)
        both = process_allgather(pair_logprobs(cfg, params, batch), tiled=True)
        logprobs[first : first + rows] = both[: len(pairs) - first]
    return logprobs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summed(objective: Objective, cfg: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return objective.summed_loss(cfg, params, batch, False)  # nothing trains while it is evaluated


def held_out_evaluator(
    cfg: ModelConfig, frozen: Any, initial: Any, examples: Sequence[Any], objective: Objective, seq: int
) -> Evaluator:
    """Returns the evaluator on held-out examples (mean nats of a completion's token) or pairs (mean
    preference loss).

    `initial`: the params before training, for a loss that has a reference.
    """
    rows = EVALUATION_ROWS * row_shards()
    if objective is NEXT_TOKEN:
        answers = list(evaluation_batches(examples, seq, rows))
        targets = sum(int(batch.mask.sum()) for batch in answers)

        def summed_nats(trainable: Any, batch: Any) -> Any:
            return score(cfg, merge(trainable, frozen), batch)

        return Evaluator(answers, summed_nats, max(targets, 1), "nats/token", "val_nats_per_token")
    reference = reference_logprobs(cfg, initial, examples, seq, rows)
    starts = range(0, len(examples), rows)
    pairs = [preference_batch(examples, range(first, first + rows), seq, reference) for first in starts]

    def summed_loss(trainable: Any, batch: Any) -> Any:
        return _summed(objective, cfg, merge(trainable, frozen), batch)

    return Evaluator(pairs, summed_loss, len(examples), "preference loss", "val_preference_loss")

"""From what `--data` says to batches to learn from, and to what is kept apart to be measured on."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from engine.errors import UserError
from engine.inference.score import score
from engine.model.config import ModelConfig
from engine.model.paths import merge
from engine.text.batch import Batch
from engine.text.chat import Chat, Example
from engine.text.conversations import NAMED, Conversations, read_conversations
from engine.text.examples import DatasetSummary, Pair, make_examples, make_pairs
from engine.text.packing import PackedBatches, PairBatches, evaluation_batches, evaluation_pairs
from engine.training.preference import Preferences, margins
from engine.training.step import NEXT_TOKEN, Objective
from stages.cli.console import Console
from stages.cli.signals import SignalState

if TYPE_CHECKING:
    from stages.finetune.flags import Finetune
    from engine.storage.loaded_model import LoadedModel

HELD_OUT = 0.1
ROWS = 2  # that an evaluation scores together
MOST = 64  # held-out examples of a look while it learns


@dataclasses.dataclass(frozen=True)
class ConversationData:
    """Examples (or pairs of them), and those held out; what became of each row of the data; what both are called."""

    learnt: Sequence[Any]
    held_out: Sequence[Any]
    summary: DatasetSummary
    kind: str
    name: str
    held_out_name: str

    @property
    def digest(self) -> str:
        """SHA-256 of every token that is read and of every mask."""
        hasher = hashlib.sha256()
        for example in (part for one in self.learnt for part in (one if isinstance(one, Pair) else (one,))):
            hasher.update(len(example.tokens).to_bytes(8, "little"))
            hasher.update(np.asarray(example.tokens, "<i4").tobytes() + np.asarray(example.mask, bool).tobytes())
        return hasher.hexdigest()

    @property
    def first(self) -> Example:
        """The first example, or the chosen answer of the first pair."""
        one = self.learnt[0]
        return one.chosen if isinstance(one, Pair) else one


def prepare_conversations(
    data: str, validation: str | None, objective: str, seq: int, model: "LoadedModel", chat: Chat, console: Console
) -> ConversationData:
    """Reads, renders and cuts all examples. Raises UserError for data of another kind than the objective needs."""
    found = _read(data, objective)
    with console.task(f"reading {data}") as report:
        learnt, summary = tokenize_examples(found, model, chat, seq, report)
    apart = validation or (f"{data}-held-out" if f"{data}-held-out" in NAMED else None)
    if apart:
        held_out = tokenize_examples(_read(apart, objective), model, chat, seq, None)[0]
        return ConversationData(learnt, held_out, summary, found.kind, data, apart)
    count = max(1, round(HELD_OUT * len(learnt)))
    if len(learnt) - count < 1:
        raise UserError(
            f"{data} has {len(learnt)} usable examples, too few to hold any out; give some of another file with --validation."
        )
    named = f"the last {count} of {data}"
    return ConversationData(learnt[:-count], learnt[-count:], summary, found.kind, data, named)


def _read(data: str, objective: str) -> Conversations:
    found = read_named(data)
    if (found.kind == "preference") != (objective == "preference"):
        wanted = "pairs of a chosen and a rejected answer" if objective == "preference" else "conversations or texts"
        other = "answers" if objective == "preference" else "preference"
        instead = ", or give other --data such as voice-preferences" if objective == "preference" else ""
        raise UserError(
            f"{data} holds {found.kind} data, and this objective learns from {wanted}; --objective {other} fits it{instead}."
        )
    return found


def read_named(data: str) -> Conversations:
    """What `--data` names, when that is conversations. Raises UserError as `read_conversations`."""
    return read_conversations(data if data in NAMED else Path(data).expanduser())


def tokenize_examples(found: Conversations, model: "LoadedModel", chat: Chat, seq: int, report: Any = None) -> tuple[Sequence[Any], DatasetSummary]:
    """Examples, or pairs of them, and what became of each row. Raises UserError when none is left."""
    if found.kind == "preference":
        return make_pairs(found, chat, seq, report=report)
    return make_examples(found, chat, seq, start=model.tokenizer.start, report=report)


class PreferenceBatches:
    """Batches of pairs with the margins that the model had for them before it learnt."""

    def __init__(self, cfg: ModelConfig, base: Any, pairs: Sequence[Pair], seq: int, batch: int, seed: int) -> None:
        self.pairs = pairs
        self._batches = PairBatches(pairs, seq, batch, seed)
        self._reference = np.zeros(len(pairs), np.float32)
        for part in evaluation_pairs(pairs, seq, batch):
            there = part.pair >= 0
            found = margins(cfg, base, Preferences(part.chosen, part.rejected))
            self._reference[part.pair[there]] = np.asarray(found)[there]

    def epoch(self, step: int) -> float:
        """Epochs completed before `step`."""
        return self._batches.epoch(step)

    def at(self, step: int) -> Preferences:
        """The pairs of a step."""
        part = self._batches.at(step)
        return Preferences(part.chosen, part.rejected, self._reference[part.pair])

    def once(self) -> Iterator[Preferences]:
        """Every pair, once, as far as they fill whole batches; at least one batch."""
        batches = max(1, len(self.pairs) // self._batches.batch)
        return (self.at(step) for step in range(batches))


@dataclasses.dataclass(frozen=True)
class HeldOutEvaluator:
    """Looks at what is held out while a run learns: mean nats of an answer's token, or of a preference."""

    batches: Sequence[Any]
    frozen: Any
    objective: Objective = NEXT_TOKEN
    unit: str = "nats/token"

    @property
    def key(self) -> str:
        """Its name in metrics.jsonl."""
        return "val_nats_per_token" if self.objective is NEXT_TOKEN else "val_preference_loss"

    def measure(self, cfg: ModelConfig, trainable: Any, watch: SignalState | None = None) -> float | None:
        """The mean over all held-out targets (or pairs); None when a signal came in between."""
        params = merge(trainable, self.frozen)
        total = count = 0.0
        for batch in self.batches:
            if watch and watch.received:
                return None
            if self.objective is NEXT_TOKEN:
                total, count = total + float(score(cfg, params, batch)), count + float(batch.mask.sum())
            else:
                total, count = (
                    total + float(_summed(self.objective, cfg, params, batch)),
                    count + float(self.objective.count(batch)),
                )
        return total / max(count, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summed(objective: Objective, cfg: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return objective.summed(cfg, params, batch)


def batch_examples(examples: Sequence[Example], seq: int, rows: int = ROWS) -> list[Batch]:
    """Every example once, in batches of one shape."""
    return list(evaluation_batches(examples, seq, rows))


def packed(given: "Finetune", lessons: ConversationData) -> PackedBatches:
    """The batches of a run that learns answers."""
    return PackedBatches(lessons.learnt, given.tuning.context, given.tuning.batch, given.seed, given.examples.pack)

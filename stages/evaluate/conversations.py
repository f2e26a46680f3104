"""Measuring a model on conversations: how probable it finds what the assistant says in them."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import format as words
from engine.errors import UserError
from engine.inference.score import score
from engine.storage.digest import digest
from engine.storage.loaded_model import LoadedModel
from engine.storage.run_folder import read_json
from engine.text.chat import Chat
from engine.text.conversations import NAMED, Conversations
from engine.text.examples import Pair, Tally
from engine.text.packing import pairs_once
from engine.training.preference import Preferences, margins
from stages.runs import conversation_data, forgetting, text_data, validation

if TYPE_CHECKING:
    from stages.cli.console import Console, ReportProgress

FILES = (".jsonl", ".json")


@dataclasses.dataclass(frozen=True)
class Heard:
    """Examples to measure on, what they are called, and what became of each row (None where that was said before)."""

    examples: Sequence[Any]
    name: str
    tally: Tally | None
    seq: int


def conversations(data: str | None) -> Conversations | None:
    """What `--data` names, if that is conversations; None for a text. Raises UserError, with file and line, for neither."""
    if data is None or not (data in NAMED or (Path(data).suffix.lower() in FILES and Path(data).is_file())):
        return None
    found = conversation_data.read_named(data)
    return None if found.kind == "text" else found


def tuned_on(model: LoadedModel) -> dict[str, Any] | None:
    """The run.json of a fine-tuning, None for any other model."""
    about = read_json(model.run / "run.json") if model.run else {}
    return about if about.get("stage") == "finetune" else None


def heard(
    model: LoadedModel, chat: Chat, found: Conversations | None, context: int | None, usual: int, console: "Console"
) -> Heard:
    """The examples of a data set, or else those that the model's fine-tuning held out."""
    about = tuned_on(model) or {}
    seq = min(context or about.get("recipe", {}).get("context") or usual, model.cfg.context)
    if found:
        examples, tally = conversation_data.tokenize_examples(found, model, chat, seq)
        return Heard(examples, f"{found.name} ({found.kind})", tally, seq)
    text = about["text"]
    made = conversation_data.prepare_conversations(
        text["data"], text["validation"], about["objective"], seq, model, chat, console
    )
    return Heard(made.held_out, made.held_out_name, None, seq)


def compared(model: LoadedModel, console: "Console") -> list[tuple[str, str]]:
    """What a fine-tuned run knew before: of what it held out, and of a text it was not about, beside what it now knows."""
    about = tuned_on(model) or {}
    result = about.get("result") or {}
    was, text = result.get("before") or {}, str(result.get("general"))
    rows = [("before", f"{was['held_out']:.4f} {result['unit']} on what is held out, before it learnt")] if was else []
    if was.get("general") is None or not (text in text_data.TEXTS or Path(text).exists()):
        return rows
    context = about["recipe"]["context"]
    now = forgetting.general_bits_per_byte(model.cfg, model.params, model.tokenizer, text, context, console)
    return [*rows, ("forgotten", f"{was['general']:.3f} -> {now:.3f} bits per byte on {text}")]


def measure(model: LoadedModel, given: Heard, report: "ReportProgress") -> list[tuple[str, str]]:
    """The rows of the result. Raises RuntimeError when reading changed a weight."""
    before, begin = digest(model.params), time.perf_counter()
    pairs = isinstance(given.examples[0], Pair)
    rows = _preferred(model, given, report) if pairs else _answers(model, given, report)
    taken = time.perf_counter() - begin
    after = digest(model.params)
    if before != after:
        raise RuntimeError(f"Evaluation changed the weights: their SHA-256 was {before} and is {after}.")
    return [*rows, ("seconds", f"{taken:.1f}"), ("weights", f"unchanged, SHA-256 {after[:16]} before and after")]


def nats_per_token(model: LoadedModel, examples: Sequence[Any], seq: int, report: "ReportProgress") -> tuple[float, int]:
    """(mean nats of an answer's token, how many there are)."""
    batches = conversation_data.batch_examples(examples, seq, min(conversation_data.ROWS, validation.rows_for(model.cfg, seq)))
    total, count = 0.0, 0
    for number, batch in enumerate(batches, 1):
        total += float(score(model.cfg, model.params, batch))
        count += int(batch.mask.sum())
        report(number, len(batches))
    if not count:
        raise UserError("None of the tokens read are an answer's.")
    return total / count, count


def _answers(model: LoadedModel, given: Heard, report: "ReportProgress") -> list[tuple[str, str]]:
    nats, count = nats_per_token(model, given.examples, given.seq, report)
    return [
        ("examples", f"{len(given.examples):,}"),
        ("answer tokens", f"{count:,}"),
        ("nats per token", f"{nats:.4f} of what the assistant says, the end of each answer included"),
        ("perplexity", f"{math.exp(min(nats, 700)):.3f}"),
    ]


def _preferred(model: LoadedModel, given: Heard, report: "ReportProgress") -> list[tuple[str, str]]:
    found: list[np.ndarray] = []
    for part in pairs_once(given.examples, given.seq, conversation_data.ROWS):
        there = part.pair >= 0
        found.append(np.asarray(margins(model.cfg, model.params, Preferences(part.chosen, part.rejected)))[there])
        report(sum(map(len, found)), len(given.examples))
    margin = np.concatenate(found)
    return [
        ("pairs", f"{len(margin):,}"),
        (
            "preferred",
            f"the chosen answer is the more probable one in {words.count(100 * float((margin > 0).mean()))}% of them",
        ),
        ("margin", f"{margin.mean():.3f} nats on average"),
    ]

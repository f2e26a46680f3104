"""How probable a model finds what the assistant says in conversations, or the chosen answers of preference pairs."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.format import count
from engine.inference.score import score
from engine.storage import run_folder
from engine.storage.loaded_model import LoadedModel
from engine.text.chat import Chat, Example
from engine.text.conversations import NAMED, Conversations
from engine.text.examples import Pair
from engine.text.packing import evaluation_pairs
from engine.training.preference import Preferences, margins
from stages.cli.console import Console, ReportProgress
from stages.evaluate.text import WINDOW
from stages.runs import conversation_data, forgetting, text_data, validation

FILES = (".jsonl", ".json")
Rows = list[tuple[str, str]]


def read(data: str | None) -> Conversations | None:
    """Reads what `--data` names; None for a text. Raises UserError, with file and line, for what is neither."""
    if data is None or not (data in NAMED or (Path(data).suffix.lower() in FILES and Path(data).is_file())):
        return None
    conversations = conversation_data.read_named(data)
    return None if conversations.kind == "text" else conversations


def finetuned(model: LoadedModel) -> dict[str, Any]:
    """Returns the run.json of a fine-tuning, empty for any other model."""
    record = run_folder.read_json(model.run / "run.json") if model.run else {}
    return record if record.get("stage") == "finetune" else {}


def evaluate(model: LoadedModel, data: Conversations | None, context: int | None, console: Console) -> Rows:
    """Scores `data`, or else the held-out set of the model's fine-tuning, beside its scores before; returns rows to print."""
    chat, record = Chat(model.tokenizer), finetuned(model)
    seq = min(context or record.get("recipe", {}).get("context") or WINDOW, model.cfg.context)
    if data:
        examples, outcome = conversation_data.tokenize_examples(data, model, chat, seq)
        name, lines = f"{data.name} ({data.kind})", outcome.describe()
    else:
        text = record["text"]
        split = conversation_data.prepare_conversations(
            text["data"], text["validation"], record["objective"], seq, model, chat, console
        )
        examples, name, lines = split.held_out, split.held_out_name, []
    console.print_rows([("data", name), *(("", line) for line in lines), ("template", chat.template_name)])
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        measure = _measure_pairs if isinstance(examples[0], Pair) else _measure_completions
        rows = measure(model, examples, seq, report)
        seconds = time.perf_counter() - begin
        rows += [] if data or context else _before_finetuning(model, record, console)
    chat.close()
    return [*rows, ("seconds", f"{seconds:.1f}")]


def _measure_completions(model: LoadedModel, examples: Sequence[Example], seq: int, report: ReportProgress) -> Rows:
    batches = conversation_data.batch_examples(examples, seq, min(conversation_data.ROWS, validation.rows_for(model.cfg, seq)))
    nats, tokens = 0.0, 0
    for number, batch in enumerate(batches, 1):
        nats += float(score(model.cfg, model.params, batch))
        tokens += int(batch.mask.sum())
        report(number, len(batches))
    if not tokens:
        raise UserError("None of the tokens read are an answer's.")
    return [
        ("examples", f"{len(examples):,}"),
        ("answer tokens", f"{tokens:,}"),
        ("nats per token", f"{nats / tokens:.4f} of what the assistant says, the end of each answer included"),
        ("perplexity", f"{math.exp(min(nats / tokens, 700)):.3f}"),
    ]


def _measure_pairs(model: LoadedModel, pairs: Sequence[Pair], seq: int, report: ReportProgress) -> Rows:
    margin = np.empty(0)
    for part in evaluation_pairs(pairs, seq, conversation_data.ROWS):
        batch = np.asarray(margins(model.cfg, model.params, Preferences(part.chosen, part.rejected)))
        margin = np.append(margin, batch[part.pair >= 0])
        report(len(margin), len(pairs))
    preferred = count(100 * float((margin > 0).mean()))
    return [
        ("pairs", f"{len(margin):,}"),
        ("preferred", f"the chosen answer is the more probable one in {preferred}% of them"),
        ("margin", f"{margin.mean():.3f} nats on average"),
    ]


def _before_finetuning(model: LoadedModel, record: dict[str, Any], console: Console) -> Rows:
    """Returns rows of what the model knew before fine-tuning and knows now, of its held-out set and of a general text."""
    result = record.get("result") or {}
    before, text = result.get("before") or {}, str(result.get("general"))
    rows = [("before", f"{before['held_out']:.4f} {result['unit']} on the held-out set, before fine-tuning")] if before else []
    if before.get("general") is None or not (text in text_data.TEXTS or Path(text).exists()):
        return rows
    context = record["recipe"]["context"]
    now = forgetting.general_bits_per_byte(model.cfg, model.params, model.tokenizer, text, context, console)
    return [*rows, ("forgotten", f"{before['general']:.3f} -> {now:.3f} bits per byte on {text}")]

"""Evaluates a model on conversations: nats per token of what the assistant says, pairs, and ratings."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.format import format_count
from engine.mesh import layout, processes
from engine.storage.model_loader import LoadedModel
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.conversations import SHIPPED, Conversations, read_conversations
from engine.text.examples import make_examples, make_pairs
from engine.text.template import Message
from engine.training.step import NEXT_TOKEN
from stages.cli.console import Console, ReportProgress
from stages.evaluate.text import WINDOW, Rows, perplexity
from stages.runs.answers import AnswerMetrics
from stages.runs.conversation_data import (
    digest_examples,
    held_out_evaluator,
    prepare_conversations,
    reference_logprobs,
    references_of,
)
from stages.runs.text_data import TEXTS
from stages.runs.text_evaluators import EVALUATION_ROWS, general_bits_per_byte


def read_if_conversations(data: str) -> Conversations | None:
    """Returns the conversations of `data`, or None if it is a text. Raises UserError."""
    is_file = Path(data).suffix.lower() in (".jsonl", ".json") and Path(data).is_file()
    if not is_file and data not in SHIPPED:
        return None
    conversations = read_conversations(data)
    if conversations.kind == "text":
        return None
    return conversations


@dataclasses.dataclass(frozen=True)
class ConversationSet:
    """Conversations to score: those of --data, or the held-out set of a fine-tuned run."""

    name: str
    notes: list[str]  # on the rows used and left out
    kind: str  # of `examples`: answers (Example), preference (Pair) or kto (RatedPair)
    examples: Sequence[Any]
    references: Sequence[Sequence[Message]]  # each up to an answer that a metric compares with
    digest: str


def evaluate_conversations(
    model: LoadedModel,
    data: Conversations | None,
    record: dict[str, Any],
    context: int | None,
    metrics: AnswerMetrics,
    console: Console,
) -> Rows:
    """Scores `data`, or the held-out set of the fine-tuning `record` beside its scores from before
    fine-tuning."""
    if record.get("stage") != "finetune":
        record = {}
    chat = ChatTokenizer(model.tokenizer)
    seq = min(context or record.get("recipe", {}).get("context") or WINDOW, model.cfg.context)
    is_whole = not data and record.get("full_loss", False)
    if data:
        conversations = _tokenize_conversations(data, chat, seq)
    else:
        conversations = _held_out_conversations(model, record, chat, seq, is_whole, console)
        if not context:
            _refuse_other_split(model, record, conversations)
    console.print_rows(
        [
            ("data", conversations.name),
            *(("", note) for note in conversations.notes),
            ("template", chat.template_name),
        ]
    )
    processes.refuse_differences({"data": conversations.digest})
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        if conversations.kind == "kto":
            rows = _score_ratings(model, conversations.examples, seq, report)
        elif conversations.kind == "preference":
            rows = _score_pairs(model, conversations.examples, seq, report)
        else:
            rows = _score_answers(model, conversations.examples, seq, is_whole, report)
    with console.task("scoring answers") as report:
        stop_token_ids = {*model.eos_ids, *chat.eot_ids}
        scores = metrics.score(
            model.cfg, model.params, chat, conversations.references, stop_token_ids, report
        )
    for task, score in scores.items():
        rows.append((task, f"{score:.4f} of {len(conversations.references):,} answers"))
    seconds = time.perf_counter() - begin
    if not data and not context:
        rows += _before_finetuning(model, record, console)
    chat.close()
    return [*rows, ("seconds", f"{seconds:.1f}")]


def _tokenize_conversations(data: Conversations, chat: ChatTokenizer, seq: int) -> ConversationSet:
    if data.kind == "preference":
        kind = "preference"
        dataset = make_pairs(data, chat, seq)
    else:
        kind = "answers"
        dataset = make_examples(data, chat, seq)
    return ConversationSet(
        name=f"{data.name} ({data.kind})",
        notes=dataset.describe(),
        kind=kind,
        examples=dataset.examples,
        references=references_of(data),
        digest=digest_examples(dataset.examples),
    )


def _held_out_conversations(
    model: LoadedModel,
    record: dict[str, Any],
    chat: ChatTokenizer,
    seq: int,
    is_whole: bool,
    console: Console,
) -> ConversationSet:
    text = record["text"]
    objective = record["objective"]
    if objective == "preference" and record.get("loss") == "kto":
        objective = "kto"
    split = prepare_conversations(
        text["data"], text["validation"], objective, seq, record["seed"], chat, console, full=is_whole
    )
    notes = []
    if split.overlap:
        notes.append(split.overlap)
    return ConversationSet(
        name=split.held_out_name,
        notes=notes,
        kind=objective,
        examples=split.held_out,
        references=split.references,
        digest=split.held_out_digest,
    )


def _refuse_other_split(model: LoadedModel, record: dict[str, Any], held_out: ConversationSet) -> None:
    """Raises UserError where the held-out set is not that of the run: the model may have been
    trained on it."""
    text = record["text"]
    if text.get("validation_digest") in (None, held_out.digest):
        return
    raise UserError(
        f"{held_out.name} is not what {model.name} was validated on: "
        f"{text['data']} or the way it is split has changed since, and it may have been trained on. "
        "Give conversations that it was not trained on with --data."
    )


def _pair_logprobs(model: LoadedModel, pairs: Sequence[Any], seq: int, report: ReportProgress) -> np.ndarray:
    return reference_logprobs(
        model.cfg, model.params, pairs, seq, EVALUATION_ROWS * layout.row_shards(), report
    )


def _score_ratings(model: LoadedModel, pairs: Sequence[Any], seq: int, report: ReportProgress) -> Rows:
    nats = -_pair_logprobs(model, pairs, seq, report)[:, 0]
    good = [row for row, pair in enumerate(pairs) if pair.is_good]
    bad = [row for row, pair in enumerate(pairs) if not pair.is_good]
    rows = [("answers", f"{len(good):,} good ones and {len(bad):,} bad ones")]
    for name, places in (("good ones", good), ("bad ones", bad)):
        if places:
            rows.append((name, f"{nats[places].mean():.3f} nats each on average"))
    return rows


def _score_pairs(model: LoadedModel, pairs: Sequence[Any], seq: int, report: ReportProgress) -> Rows:
    logprobs = _pair_logprobs(model, pairs, seq, report)
    margin = logprobs[:, 0] - logprobs[:, 1]
    preferred = format_count(100 * (margin > 0).mean())
    return [
        ("pairs", f"{len(margin):,}"),
        ("preferred", f"the chosen answer is the more probable one in {preferred}% of them"),
        ("margin", f"{margin.mean():.3f} nats on average"),
    ]


def _score_answers(
    model: LoadedModel, examples: Sequence[Any], seq: int, is_whole: bool, report: ReportProgress
) -> Rows:
    evaluator = held_out_evaluator(model.cfg, {}, None, examples, NEXT_TOKEN, seq)
    nats = evaluator.evaluate(model.params, report)
    assert nats is not None
    unit = "answer tokens"
    scored = "what the assistant says, the end of each answer included"
    if is_whole:
        unit = "scored tokens"
        scored = "whole conversations"
    return [
        ("examples", f"{len(examples):,}"),
        (unit, f"{evaluator.size:,}"),
        ("nats per token", f"{nats:.4f} of {scored}"),
        ("perplexity", perplexity(nats)),
    ]


def _before_finetuning(model: LoadedModel, record: dict[str, Any], console: Console) -> Rows:
    result = record.get("result") or {}
    before = result.get("before") or {}
    rows = []
    if before:
        # The score at the run's end stands beside it, for a preference loss is not measured here.
        scores = f"{before['held_out']:.4f} {result['unit']} on the held-out set, before fine-tuning"
        rows.append(("before", f"{scores}; {result['after']['held_out']:.4f} at its end"))
    text = str(result.get("general"))
    is_there = text in TEXTS or Path(text).exists()
    if before.get("general") is None or not is_there:
        return rows
    context = record["recipe"]["context"]
    now = general_bits_per_byte(model.cfg, model.params, model.tokenizer, text, context, console)
    rows.append(("forgotten", f"{before['general']:.3f} -> {now:.3f} bits per byte on {text}"))
    return rows

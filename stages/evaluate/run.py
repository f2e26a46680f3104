"""Evaluates a model: its likelihood of a text, by a sliding window, or of the answers in conversations."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from engine import distributed, placement, sharding
from engine.device import Device, host_memory
from engine.errors import UserError
from engine.format import format_count
from engine.inference.score import score
from engine.storage import run_folder
from engine.storage.digest import digest
from engine.storage.model_loader import LoadedModel, load_model
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.conversations import SHIPPED, Conversations, read_conversations
from engine.text.examples import Pair
from engine.text.packing import evaluation_batches
from stages.cli.console import Console, ReportProgress
from stages.evaluate.flags import EvaluateFlags
from stages.runs import validation
from stages.runs.data.conversations import (
    EVALUATION_ROWS,
    digest_examples,
    pair_margins,
    prepare_conversations,
    tokenize_examples,
)
from stages.runs.data.text import TEXTS, Source, digest_tokens, encode_text, evaluation_source, find_sources, source_name
from stages.runs.mesh import choose_mesh, device_with_mesh, make_mesh_here

WINDOW = 1024  # tokens by default: more tell little and take much longer
Rows = list[tuple[str, str]]  # to print


def run(flags: EvaluateFlags, device: Device) -> None:
    """Loads the model, scores the data, prints. Raises RuntimeError when scoring changed a weight."""
    shape = choose_mesh(flags.mesh.mesh)
    mesh = make_mesh_here(shape) if shape else None
    with Console() as console, jax.set_mesh(mesh):
        data = _read_conversations(flags.data) if flags.data else None
        with distributed.process_0_first(), console.task("loading"), host_memory(mesh is not None):
            model = load_model(flags.model, on_config=lambda cfg: placement.check_inference(cfg, mesh))
        console.print_notes(model.notes)
        console.print_rows([("device", str(device_with_mesh(device, shape))), ("model", str(model))])
        if distributed.process_count() > 1:
            options = {f"--{name}": str(getattr(flags, name)) for name in ("data", "context", "stride", "batch")}
            distributed.refuse_differences(options | {"--mesh": str(shape), "model": digest(model.params)})
        model = dataclasses.replace(model, params=placement.place(model.cfg, model.params))
        before = _digest(model.params)
        record = run_folder.read_json(model.run / "run.json") if model.run else {}
        if data or (flags.data is None and record.get("stage") == "finetune"):
            if flags.stride or flags.batch:
                raise UserError("--stride and --batch are for texts; conversations are read one by one.")
            rows = evaluate_conversations(model, data, record, flags.context, console)
        else:
            rows = evaluate_text(model, flags.data, record, flags.context, flags.stride, flags.batch, console)
        after = _digest(model.params)
        same = "unchanged" if before == after else "CHANGED"
        console.print_rows([*rows, ("weights", f"{same}, SHA-256 {after[:16]} before and after")])
        if before != after:
            raise RuntimeError(f"Evaluation changed the weights: their SHA-256 was {before} and is {after}.")


def _digest(params: Any) -> str:
    """Returns the digest of the parameters as they lie in memory: on a `tensor` axis not in the order of files."""
    return digest(process_allgather(params, tiled=True) if distributed.process_count() > 1 else params)


def _read_conversations(data: str) -> Conversations | None:
    is_file = Path(data).suffix.lower() in (".jsonl", ".json") and Path(data).is_file()
    conversations = read_conversations(data) if is_file or data in SHIPPED else None
    return conversations if conversations and conversations.kind != "text" else None


def _likelihood(nats: float, tokens: int) -> tuple[str, str]:
    return f"{nats / tokens:.4f}", f"{math.exp(min(nats / tokens, 700)):.3f}"


def evaluate_text(
    model: LoadedModel, data: str | None, record: dict[str, Any], context: int | None, stride: int | None, batch: int | None,
    console: Console,
) -> Rows:  # fmt: skip
    """Scores every token of a text but the first, each after context - stride tokens or more. Raises UserError."""
    with distributed.process_0_first():
        source = evaluation_source(data, console) if data else _validation_source(model, record, console)
        text, cfg = encode_text(source, model.tokenizer, console), model.cfg
    seq = min(context or min(cfg.context, WINDOW), max(2, len(text.tokens) - 1))
    stride = stride or max(1, seq // 2)
    if stride > seq:
        raise UserError(f"--stride {stride:,} would leave tokens out: it is at most the window of {seq:,} tokens.")
    beyond = f" (the model was trained on {cfg.context:,})" if seq > cfg.context else ""
    batch = batch or validation.rows_in_memory(cfg, seq)
    window = f"{seq:,} tokens{beyond}, moved on by {stride:,}; {batch * sharding.row_shards()} at a time"
    distributed.refuse_differences({"text": digest_tokens(text)})
    console.print_rows([("text", source_name(source)), ("window", window)])
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        nats = validation.score_text(cfg, model.params, text.tokens, seq, stride, batch, report)
    seconds = time.perf_counter() - begin
    scored = len(text.tokens) - 1
    per_token, perplexity = _likelihood(nats, scored)
    return [
        ("tokens", f"{len(text.tokens):,}"),
        ("bytes", f"{text.bytes:,}"),
        ("nats per token", per_token),
        ("perplexity per token", perplexity),
        ("bits per byte", f"{validation.bits_per_byte(nats, text.bytes):.4f}"),
        ("seconds", f"{seconds:.1f} ({format_count(scored / seconds)} tokens/s)"),
    ]


def _validation_source(model: LoadedModel, record: dict[str, Any], console: Console) -> Source:
    text = record.get("text", {})
    if not text.get("data") or record.get("stage") == "reinforce":
        raise UserError(f"{model.name} does not say what it was validated on; give --data.")
    held_out = Path(text["validation"]) if text.get("validation") else None
    if (source := find_sources(text["data"], held_out, console)[1]) is None:
        raise UserError("The run was validated on the end of a .bin; give a text with --data.")
    return source


def evaluate_conversations(
    model: LoadedModel, data: Conversations | None, record: dict[str, Any], context: int | None, console: Console
) -> Rows:
    """Scores `data`, or the held-out set of the fine-tuning `record` beside its scores from before fine-tuning."""
    record = record if record.get("stage") == "finetune" else {}
    chat = ChatTokenizer(model.tokenizer)
    seq = min(context or record.get("recipe", {}).get("context") or WINDOW, model.cfg.context)
    if data:
        examples, outcome = tokenize_examples(data, model, chat, seq)
        name, lines = f"{data.name} ({data.kind})", outcome.describe()
    else:
        names, objective = (record["text"]["data"], record["text"]["validation"]), record["objective"]
        split = prepare_conversations(*names, objective, seq, record["seed"], model, chat, console)
        examples, name, lines = split.held_out, split.held_out_name, [split.overlap] if split.overlap else []
        expected = record["text"].get("validation_digest")
        if not context and expected and digest_examples(examples) != expected:
            raise UserError(
                f"{name} is not what {model.name} was validated on: {names[0]} or the way it is split has changed since, and "
                "it may have been trained on. Give conversations that it was not trained on with --data."
            )
    console.print_rows([("data", name), *(("", line) for line in lines), ("template", chat.template_name)])
    distributed.refuse_differences({"data": digest_examples(examples)})
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        measure = _score_pairs if isinstance(examples[0], Pair) else _score_answers
        rows = measure(model, examples, seq, report)
    seconds = time.perf_counter() - begin
    rows += [] if data or context else _before_finetuning(model, record, console)
    chat.close()
    return [*rows, ("seconds", f"{seconds:.1f}")]


def _score_answers(model: LoadedModel, examples: Sequence[Example], seq: int, report: ReportProgress) -> Rows:
    batches = list(evaluation_batches(examples, seq, EVALUATION_ROWS * sharding.row_shards()))
    nats = 0.0
    for number, batch in enumerate(batches, 1):
        nats += float(score(model.cfg, model.params, batch))
        report(number, len(batches))
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    per_token, perplexity = _likelihood(nats, tokens)
    return [
        ("examples", f"{len(examples):,}"),
        ("answer tokens", f"{tokens:,}"),
        ("nats per token", f"{per_token} of what the assistant says, the end of each answer included"),
        ("perplexity", perplexity),
    ]


def _score_pairs(model: LoadedModel, pairs: Sequence[Pair], seq: int, report: ReportProgress) -> Rows:
    margin = np.empty(0)
    for part, batch in pair_margins(model.cfg, model.params, pairs, seq, EVALUATION_ROWS * sharding.row_shards()):
        margin = np.append(margin, batch[part.pair >= 0])
        report(len(margin), len(pairs))
    won = format_count(100 * float((margin > 0).mean()))
    return [
        ("pairs", f"{len(margin):,}"),
        ("preferred", f"the chosen answer is the more probable one in {won}% of them"),
        ("margin", f"{margin.mean():.3f} nats on average"),
    ]


def _before_finetuning(model: LoadedModel, record: dict[str, Any], console: Console) -> Rows:
    """Returns the run's scores before fine-tuning on the held-out set, and before and now on a general text."""
    result = record.get("result") or {}
    before, text = result.get("before") or {}, str(result.get("general"))
    rows = [("before", f"{before['held_out']:.4f} {result['unit']} on the held-out set, before fine-tuning")] if before else []
    if before.get("general") is None or not (text in TEXTS or Path(text).exists()):
        return rows
    cfg, params, context = model.cfg, model.params, record["recipe"]["context"]
    now = validation.general_bits_per_byte(cfg, params, model.tokenizer, text, context, console)
    return [*rows, ("forgotten", f"{before['general']:.3f} -> {now:.3f} bits per byte on {text}")]

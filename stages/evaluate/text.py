"""Evaluates a model on a text: nats per token and bits per byte, by a sliding window."""

import math
import time
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.format import format_count
from engine.mesh import layout, processes
from engine.storage.model_loader import LoadedModel
from stages.cli.console import Console
from stages.runs import text_data
from stages.runs.text_evaluators import bits_per_byte, rows_in_memory, score_text

WINDOW = 1024  # tokens by default: more tell little and take much longer
LARGEST_EXPONENT = 700  # whose power of e a float holds
Rows = list[tuple[str, str]]  # to print


def perplexity(nats: float) -> str:
    return f"{math.exp(min(nats, LARGEST_EXPONENT)):.3f}"


def evaluate_text(
    model: LoadedModel,
    data: str | None,
    record: dict[str, Any],
    console: Console,
    *,
    context: int | None,
    stride: int | None,
    batch: int | None,
) -> Rows:
    """Scores every token of a text but the first, each after context - stride tokens or more.

    The text is `data`, else what the run of `record` was validated on. Raises UserError.
    """
    with processes.process_0_first():
        if data:
            source = text_data.evaluation_source(data, console)
        else:
            source = _validation_source(model, record, console)
        text = text_data.encode_text(source, model.tokenizer, console)
    cfg = model.cfg
    if context is None:
        context = min(cfg.context, WINDOW)
    seq = min(context, max(2, len(text.tokens) - 1))
    stride = stride or max(1, seq // 2)
    if stride > seq:
        raise UserError(
            f"--stride {stride:,} would leave tokens out: it is at most the window of {seq:,} tokens."
        )
    batch = batch or rows_in_memory(cfg, seq)
    window = f"{seq:,} tokens"
    if seq > cfg.context:
        window += f" (the model was trained on {cfg.context:,})"
    window += f", moved on by {stride:,}; {batch * layout.row_shards()} at a time"
    processes.refuse_differences({"text": text_data.digest_tokens(text)})
    console.print_rows([("text", text_data.source_name(source)), ("window", window)])
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        nats = score_text(cfg, model.params, text.tokens, seq, stride, batch, report)
    seconds = time.perf_counter() - begin
    scored = len(text.tokens) - 1
    return [
        ("tokens", f"{len(text.tokens):,}"),
        ("bytes", f"{text.bytes:,}"),
        ("nats per token", f"{nats / scored:.4f}"),
        ("perplexity per token", perplexity(nats / scored)),
        ("bits per byte", f"{bits_per_byte(nats, text.bytes):.4f}"),
        ("seconds", f"{seconds:.1f} ({format_count(scored / seconds)} tokens/s)"),
    ]


def _validation_source(model: LoadedModel, record: dict[str, Any], console: Console) -> text_data.Source:
    text = record.get("text", {})
    if not text.get("data") or record.get("stage") == "reinforce":
        raise UserError(f"{model.name} does not say what it was validated on; give --data.")
    held_out = None
    if text.get("validation"):
        held_out = Path(text["validation"])
    _, source = text_data.find_sources(text["data"], held_out, console)
    if source is None:
        raise UserError("The run was validated on the end of a .bin; give a text with --data.")
    return source

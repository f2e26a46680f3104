"""Bits per byte of a text, by a window that slides over it."""

import math
import time
from pathlib import Path

from engine.errors import UserError
from engine.format import count
from engine.storage import run_folder
from engine.storage.loaded_model import LoadedModel
from engine.text.tokens import TokenFile
from stages.cli.console import Console
from stages.runs import text_data, validation

WINDOW = 1024  # tokens, unless asked for: more look back tells little more and takes much longer


def evaluate(
    model: LoadedModel, data: str | None, context: int | None, stride: int | None, batch: int | None, console: Console
) -> list[tuple[str, str]]:
    """Scores every token of a text but the first, each behind context - stride tokens or more; returns rows to print.

    Raises UserError for a stride above the window, which would leave tokens out, and when there is no text.
    """
    text, name = _find_text(model, data, console)
    cfg = model.cfg
    # A window longer than the text holds nothing more.
    seq = min(context or min(cfg.context, WINDOW), max(2, len(text.tokens) - 1))
    stride = stride or max(1, seq // 2)
    if stride > seq:
        raise UserError(f"--stride {stride:,} would leave tokens out: it is at most the window of {seq:,} tokens.")
    beyond = f" (the model was trained on {cfg.context:,})" if seq > cfg.context else ""
    batch = batch or validation.rows_for(cfg, seq)
    console.print_rows([
        ("text", name), ("window", f"{seq:,} tokens{beyond}, moved on by {stride:,}; {batch} at a time")
    ])  # fmt: skip
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        nats = validation.score_text(cfg, model.params, text, seq, stride, batch, report)
    seconds = time.perf_counter() - begin
    scored = len(text.tokens) - 1
    return [
        ("tokens", f"{len(text.tokens):,}"),
        ("bytes", f"{text.bytes:,}"),
        ("nats per token", f"{nats / scored:.4f}"),
        ("perplexity per token", f"{math.exp(min(nats / scored, 700)):.3f}"),
        ("bits per byte", f"{validation.bits_per_byte(nats, text.bytes):.4f}"),
        ("seconds", f"{seconds:.1f} ({count(scored / seconds)} tokens/s)"),
    ]


def _find_text(model: LoadedModel, data: str | None, console: Console) -> tuple[TokenFile, str]:
    """Returns the tokens to score and the text's name: of `data`, or of what the model's run was validated on."""
    if data:
        source: text_data.Source | None = text_data.evaluation_source(data, console)
    elif model.run is None:
        raise UserError(f"{model.name} does not say what it was validated on; give --data.")
    else:
        record = run_folder.read_json(model.run / "run.json")
        text = record.get("text", {})
        if not text.get("data") or record.get("stage") == "reinforce":
            raise UserError(f"{model.run / 'run.json'} does not say what the run was validated on; give --data.")
        validation_path = Path(text["validation"]) if text.get("validation") else None
        source = text_data.find_sources(text["data"], validation_path, console)[1]
    if source is None:
        raise UserError("The run was validated on the end of a .bin; give a text with --data.")
    return text_data.encode_text(source, model.tokenizer, console), text_data.source_name(source)

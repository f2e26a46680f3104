"""Measure a model: bits per byte on a whole text by a sliding window, or nats per token on conversations.

    python -m stages.evaluate                               the newest run, on what it was validated on
    python -m stages.evaluate --model runs/demo-shakespeare --data book.txt
    python -m stages.evaluate --model smollm2-135m-instruct --data voice-held-out

Of a text, every token but the first is scored once, behind at least half a window of it. Of conversations, only what the
assistant says is scored. Of a fine-tuned run, what it holds out, and the text by which it said what was forgotten, are set
beside what was measured before it learnt.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from stages.cli.command import run_command
from stages.cli.flags import DeviceFlag, ModelFlag, VerboseFlag, default, integer, parser

WINDOW = 1024  # tokens, unless asked for: more look back tells little more and takes much longer

if TYPE_CHECKING:
    from engine.storage.loaded_model import LoadedModel
    from engine.text.conversations import Conversations
    from engine.text.tokens import TokenFile
    from stages.cli.console import Console


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """A model, a text, and how the window slides."""

    model: ModelFlag = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or a named model."""
    data: Annotated[str | None, parser(str, "TEXT"), default("what the run was validated on")] = None
    """A text (a name, whose held-out part is meant, a file or a folder), or conversations as `finetune` takes them."""
    context: Annotated[int | None, parser(integer(2), "N"), default("the model's context, at most 1,024")] = None
    """Tokens a window."""
    stride: Annotated[int | None, parser(integer(1), "N"), default("half the window")] = None
    """Tokens between windows of a text: each token is predicted from at least context - stride before it."""
    batch: Annotated[int | None, parser(integer(1), "N"), default("as many as suit the memory")] = None
    """Windows of a text read together."""
    device: DeviceFlag = "auto"
    """auto, cpu, gpu or tpu."""
    verbose: VerboseFlag = False
    """Show the traceback of an error."""


def evaluate(given: Evaluate) -> None:
    """Loads, scores, prints; and checks that reading a text changed no weight."""
    from engine.device import start_jax
    from stages.cli import signals

    signals.set_phase("before the evaluation was done.")
    started = start_jax(given.device)
    from engine.storage.find import load_model
    from stages import answers
    from stages.cli.console import Console

    with Console() as console:
        said = answers.conversations(given.data)
        with console.task("loading"):
            model = load_model(given.model)
        console.warn_damaged(model.damaged, model.checkpoint)
        console.print_rows([("device", str(started)), ("model", str(model.checkpoint))])
        if said or (given.data is None and answers.tuned_on(model)):
            _on_answers(given, model, said, console)
        else:
            _on_text(given, model, console)


def _on_answers(given: Evaluate, model: "LoadedModel", said: "Conversations | None", console: "Console") -> None:
    from engine.errors import UserError
    from engine.text.chat import Chat
    from stages import answers

    if given.stride or given.batch:
        raise UserError("--stride and --batch are for texts; conversations are read one by one.")
    chat = Chat(model.tokenizer)
    heard = answers.heard(model, chat, said, given.context, WINDOW, console)
    lines = heard.tally.lines() if heard.tally else []
    console.print_rows([("data", heard.name), *(("", line) for line in lines), ("template", chat.named)])
    with console.task("evaluating", always=True) as report:
        rows = answers.measure(model, heard, report)
        rows += [] if said or given.context else answers.compared(model, console)
    console.print_rows(rows)
    chat.close()


def _on_text(given: Evaluate, model: "LoadedModel", console: "Console") -> None:
    from engine import format as words
    from engine.errors import UserError
    from engine.storage.digest import digest
    from stages.runs import validation

    text, name = _text(given, model, console)
    cfg = model.cfg
    # A window longer than the text holds nothing more.
    seq = min(given.context or min(cfg.context, WINDOW), max(2, len(text.tokens) - 1))
    stride = given.stride or max(1, seq // 2)
    if stride > seq:
        raise UserError(f"--stride {stride:,} would leave tokens out: it is at most the window of {seq:,} tokens.")
    beyond = f" (the model was trained on {cfg.context:,})" if seq > cfg.context else ""
    rows = given.batch or validation.rows_for(cfg, seq)
    console.print_rows(
        [
            ("text", name),
            ("window", f"{seq:,} tokens{beyond}, moved on by {stride:,}; {rows} at a time"),
        ]
    )
    before = digest(model.params)
    begin = time.perf_counter()
    with console.task("evaluating", always=True) as report:
        nats = validation.score_text(cfg, model.params, text, seq, stride, rows, report)
    taken = time.perf_counter() - begin
    after = digest(model.params)
    scored = len(text.tokens) - 1
    console.print_rows(
        [
            ("tokens", f"{len(text.tokens):,}"),
            ("bytes", f"{text.bytes:,}"),
            ("nats per token", f"{nats / scored:.4f}"),
            ("perplexity per token", f"{math.exp(min(nats / scored, 700)):.3f}"),
            ("bits per byte", f"{validation.bits_per_byte(nats, text.bytes):.4f}"),
            ("seconds", f"{taken:.1f} ({words.count(scored / taken)} tokens/s)"),
            ("weights", f"{'unchanged' if before == after else 'CHANGED'}, SHA-256 {after[:16]} before and after"),
        ]
    )
    if before != after:
        raise RuntimeError(f"Evaluation changed the weights: their SHA-256 was {before} and is {after}.")


def _text(given: Evaluate, model: "LoadedModel", console: "Console") -> "tuple[TokenFile, str]":
    """The tokens to score and what they are called."""
    from engine.errors import UserError
    from engine.storage.run_folder import read_json
    from stages.runs import text_data

    if given.data:
        source = text_data.evaluation_source(given.data, console)
    else:
        if model.run is None:
            raise UserError(f"{model.name} does not say what it was validated on; give --data.")
        about = read_json(model.run / "run.json")
        trained_on = about.get("text", {})
        validation = trained_on.get("validation")
        if not trained_on.get("data") or "asked" in about:
            raise UserError(f"{model.run / 'run.json'} does not say what the run was validated on; give --data.")
        found = text_data.find_sources(trained_on["data"], Path(validation) if validation else None, console)[1]
        if found is None:
            raise UserError("The run was validated on the end of a .bin; give a text with --data.")
        source = found
    return text_data.encode_text(source, model.tokenizer, console), text_data.source_name(source)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("evaluate", __doc__, Evaluate, evaluate, args)


if __name__ == "__main__":
    sys.exit(main())

"""The end of a training run: bits per byte on the whole validation text, a sample, and what to type next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.counting.hardware import peak_rss_bytes
from engine.files import whole_file
from engine.format import duration, size
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from engine.model.config import ModelConfig
from engine.text.tokenizer import Tokenizer
from stages.cli.command import command_line
from stages.cli.console import Console
from stages.runs.estimate import RunPlan, ceiling, measured_ceilings
from stages.runs.loop import LoopState
from stages.runs.run import RunReport
from stages.runs.text_data import TextData
from stages.runs.validation import bits_per_byte, rows_for, score_text

SAMPLE = 160  # tokens
LONG = 60.0  # seconds of training


def training_report(
    plan: RunPlan, data: TextData, params: Any, loop_state: LoopState, epoch: float, folder: Path, console: Console,
    sample: Callable[[], str], remarks: list[tuple[str, str]],
) -> RunReport:  # fmt: skip
    """Evaluates the trained params, writes what `sample` returns, and returns result and last screen.

    `epoch` is how often the text was read, `remarks` are more rows of the last screen.
    """
    cfg, step, seconds = plan.cfg, loop_state.step, loop_state.seconds
    with console.task("evaluating on the whole validation text", always=True) as report:
        rows, stride = rows_for(cfg, cfg.context), max(1, cfg.context // 2)
        nats = score_text(cfg, params, data.validation, cfg.context, stride, rows, report)
    with console.task("writing a sample"):
        text = sample()
    with whole_file(folder / "samples" / f"{step}.txt") as file:
        file.write(text.encode())
    # Measuring takes seconds: a run that is hardly longer itself takes the ceilings as they are.
    top = ceiling(cfg, measured_ceilings(console, again=seconds >= LONG))
    peak = peak_rss_bytes()
    result = {
        "val_bits_per_byte": bits_per_byte(nats, data.validation.bytes),
        "train_seconds": seconds,
        "first_step_seconds": loop_state.first_step_seconds,
        "peak_rss_bytes": peak,
        "tokens_per_second": step * plan.step_tokens / seconds,
        "mfu": step * plan.step_flops / seconds / top,
        "steps": step,
        "refused_steps": loop_state.refused,
    }
    refused = f", {loop_state.refused} of them refused (not finite)" if loop_state.refused else ""
    screen = [
        ("validation", f"{result['val_bits_per_byte']:.4f} bits per byte on all of {data.validation_name}"),
        ("trained", f"{step:,} steps, epoch {epoch:.2f}, {duration(seconds)}{refused}"),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.0%}; first step "
                  f"{duration(loop_state.first_step_seconds or 0)} after the start"),
        ("memory", f"{size(peak)} at most"),
        *remarks,
        ("files", f"{folder}: config.json, run.json, metrics.jsonl, tokenizer, checkpoints, samples"),
    ]  # fmt: skip
    prompt = ("--prompt", "ROMEO:") if data.name == "shakespeare" else ()
    commands = [command_line("generate", "--model", folder, *prompt), command_line("evaluate", "--model", folder)]
    return RunReport(result, [("what it writes", [f"| {line}" for line in text.strip("\n").split("\n")])], screen, commands)


def sample_text(cfg: ModelConfig, params: Any, tokenizer: Tokenizer, seed: int) -> str:
    """Returns a text that the model writes after a line end."""
    sampling = SamplingParams(max_tokens=SAMPLE, temperature=0.8, seed=seed, stop_token_ids=(tokenizer.end,))
    pieces = generate(cfg, for_inference(cfg, params), [tokenizer.encode("\n").tolist()], [sampling])
    return tokenizer.decode([token for piece in pieces for token in piece.tokens])

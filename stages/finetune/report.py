"""The measurements before and after fine-tuning, and the last screen."""

import dataclasses
from pathlib import Path
from typing import Any

from engine.counting.hardware import peak_rss_bytes
from engine.format import duration, size
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from engine.model.config import ModelConfig
from engine.text.chat import Chat
from stages.cli.command import command_line
from stages.runs.estimate import RunPlan
from stages.runs.loop import LoopState
from stages.runs.run import RunReport

SAMPLE = 90  # tokens
QUESTION = "What should I do when I cannot sleep?"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How a model does: on what is held out, on general text (bits per byte; None without one), and one answer."""

    held_out: float
    general: float | None
    answer: str


def answer_question(cfg: ModelConfig, params: Any, chat: Chat, ends: tuple[int, ...]) -> str:
    """Returns the model's answer to QUESTION, each token the most probable."""
    prompt = chat.prompt([{"role": "user", "content": QUESTION}])
    sampling = SamplingParams(max_tokens=SAMPLE, temperature=0.0, stop_token_ids=ends)
    room = min(cfg.context, len(prompt) + SAMPLE)
    pieces = generate(cfg, for_inference(cfg, params), [prompt.tolist()], [sampling], capacity=room)
    return chat.tokenizer.decode([token for piece in pieces for token in piece.tokens])


def finetuning_report(
    plan: RunPlan, loop_state: LoopState, before: Measurement, after: Measurement, unit: str, held_out_name: str, general: str,
    share_of_ceiling: float, place: Path, numbers: int, folder: Path,
) -> RunReport:  # fmt: skip
    """Returns result and last screen. `general` names the general text, `place` holds the `numbers` that were trained."""
    seconds, speed = loop_state.seconds, loop_state.step * plan.step_tokens / max(loop_state.seconds, 1e-9)
    peak = peak_rss_bytes()
    result = {
        "before": dataclasses.asdict(before), "after": dataclasses.asdict(after), "unit": unit, "steps": loop_state.step,
        "train_seconds": seconds, "tokens_per_second": speed, "peak_rss_bytes": peak,
        "flops_share_of_ceiling": share_of_ceiling, "refused_steps": loop_state.refused, "general": general,
    }  # fmt: skip
    forgotten = "not measured"
    if before.general is not None and after.general is not None:
        forgotten = f"{before.general:.3f} -> {after.general:.3f} bits per byte on {general}"
    refused = f", {loop_state.refused} refused" if loop_state.refused else ""
    rows = [
        ("held out", f"{before.held_out:.3f} -> {after.held_out:.3f} {unit} on {held_out_name}"),
        ("forgotten", forgotten),
        ("trained", f"{loop_state.step:,} steps, {duration(seconds)}{refused}"),
        ("speed", f"{speed:,.0f} tokens/s, {share_of_ceiling:.0%} of the ceiling"),
        ("memory", f"{size(peak)} at most"),
        ("saved", f"{place} ({numbers:,} numbers)"),
    ]
    texts = [
        (f"{title}: {QUESTION}", [f"| {line}" for line in measurement.answer.strip().split("\n")])
        for title, measurement in (("before", before), ("after", after))
    ]
    commands = [
        command_line("chat", "--model", folder),
        command_line("evaluate", "--model", folder),
        command_line("export", "--model", folder, "--out", folder / "hugging-face"),
    ]
    return RunReport(result, texts, rows, commands)

"""The end of a run: bits per byte on the whole validation text, a sample, run.json's result, and what to type next."""

from typing import TYPE_CHECKING, Any

from engine import format as words
from engine.counting.hardware import peak_rss_bytes
from engine.files import whole_file
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from stages.cli import signals
from stages.cli.command import command_line
from stages.runs import folder as run_folder
from stages.runs.estimate import ceiling, measured_ceilings
from stages.runs.loop import Loop
from stages.runs.validation import bits_per_byte, rows_for, score_text

if TYPE_CHECKING:
    from stages.train.run import Run

SAMPLE = 160  # tokens
LONG = 60.0  # seconds of training


def close(run: "Run", state: Any, loop: Loop) -> int:
    """Evaluates, samples, writes the result and prints it."""
    console, cfg, past, folder = run.console, run.plan.cfg, loop.past, run.folder
    signals.set_phase(f"before the last evaluation; the trained model is in {folder}, and the same command evaluates it.")
    with console.task("evaluating on the whole validation text", always=True) as report:
        nats = score_text(
            cfg, state.trainable, run.data.validation, cfg.context, max(1, cfg.context // 2),
            rows_for(cfg, cfg.context), report,
        )  # fmt: skip
    value = bits_per_byte(nats, run.data.validation.bytes)
    with console.task("writing a sample"):
        text = run.sample(state)
    with whole_file(folder / "samples" / f"{past.step}.txt") as file:
        file.write(text.encode())
    speed = past.step * run.plan.step_tokens / past.seconds
    # Measuring takes seconds: a run that is hardly longer itself takes the ceilings as they are.
    top = ceiling(cfg, measured_ceilings(console, again=past.seconds >= LONG))
    result = {
        "val_bits_per_byte": value,
        "train_seconds": past.seconds,
        "first_step_seconds": past.first_step_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "tokens_per_second": speed,
        "mfu": past.step * run.plan.step_flops / past.seconds / top,
        "steps": past.step,
        "refused_steps": past.refused,
    }
    run_folder.write_run_json(folder, run.facts(), result)
    summary(run, loop, result, text, run.remarks(state))
    return 0


def sample(run: "Run", state: Any) -> str:
    """What the model writes after a line end."""
    cfg, tokenizer = run.plan.cfg, run.data.tokenizer
    params = for_inference(cfg, state.trainable)
    prompt = tokenizer.encode("\n").tolist()
    tokens: list[int] = []
    sampling = SamplingParams(max_tokens=SAMPLE, temperature=0.8, seed=run.given.seed, stop_token_ids=(tokenizer.end,))
    for new in generate(cfg, params, [prompt], [sampling]):
        tokens += new.tokens
    return tokenizer.decode(tokens)


def summary(run: "Run", loop: Loop, result: dict[str, Any], text: str, remarks: list[tuple[str, str]]) -> None:
    """The last screen."""
    console, past, folder = run.console, loop.past, run.folder
    epochs = loop.job.batches.epoch(past.step)
    refused = f", {past.refused} of them refused (not finite)" if past.refused else ""
    console.print()
    console.print("what it writes", style="bold")
    console.print("\n".join(f"  | {line}" for line in text.strip("\n").split("\n")))
    console.print()
    console.print_rows(
        [
            ("validation", f"{result['val_bits_per_byte']:.4f} bits per byte on all of {run.data.validation_name}"),
            ("trained", f"{past.step:,} steps, epoch {epochs:.2f}, {words.duration(past.seconds)}{refused}"),
            ("speed", f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.0%}; first step "
                      f"{words.duration(past.first_step_seconds or 0)} after the start"),
            ("memory", f"{words.size(result['peak_rss_bytes'])} at most"),
            *remarks,
            ("files", f"{folder}: config.json, run.json, metrics.jsonl, tokenizer, checkpoints, samples"),
        ]
    )  # fmt: skip
    console.print()
    console.print("next", style="bold")
    prompt = ("--prompt", "ROMEO:") if run.given.text.data == "shakespeare" else ()
    console.print(f"  {command_line('generate', '--model', folder, *prompt)}")
    console.print(f"  {command_line('evaluate', '--model', folder)}")

"""The end of a fine-tuning: what was learnt, what was forgotten, an answer before and after, and what to type next."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from engine import format as words
from engine.allocator import return_freed_memory
from engine.counting.hardware import peak_rss_bytes
from engine.inference.decode import for_inference, generate
from engine.inference.sampling_params import SamplingParams
from engine.model.paths import leaf_paths, merge
from engine.storage.adapter import save_adapter
from engine.storage.digest import digest
from engine.storage.run_folder import ADAPTER
from stages.cli import signals
from stages.cli.command import command_line
from stages.runs import folder as run_folder
from stages.runs import forgetting
from stages.runs.loop import Loop

if TYPE_CHECKING:
    from stages.finetune.run import Tuned

SAMPLE = 90  # tokens
QUESTION = "What should I do when I cannot sleep?"


@dataclasses.dataclass(frozen=True)
class Look:
    """How a model does: on what is held out, on general text (bits per byte; None without one), and one answer."""

    held_out: float
    general: float | None
    answer: str


def look(run: "Tuned", trainable: Any) -> Look:
    """Measures the model with `trainable` as what learns."""
    return_freed_memory()
    cfg, learner = run.plan.cfg, run.learner
    held_out = run.held_out()
    with run.console.task("measuring what it knows", always=True):
        value = held_out.measure(cfg, trainable)
        params = merge(trainable, learner.frozen)
        known = _general(run, params)
        # The programs that scored are as large as a small model, and are not run again before the step is compiled.
        jax.clear_caches()
        return_freed_memory()
        return Look(value, known, _answer(run, params))


def _general(run: "Tuned", params: Any) -> float | None:
    """Bits per byte on the beginning of a text that has nothing to do with the examples."""
    wanted = run.given.examples.general
    if wanted == "none":
        return None
    return forgetting.general_bits_per_byte(
        run.plan.cfg, params, run.model.tokenizer, wanted, run.plan.recipe.context, run.console
    )


def _answer(run: "Tuned", params: Any) -> str:
    """What the model answers to one question, each token the most probable."""
    cfg = run.plan.cfg
    prompt = run.chat.prompt([{"role": "user", "content": QUESTION}])
    room = min(cfg.context, len(prompt) + SAMPLE)
    ends = tuple(end for end in (*run.model.ends, run.chat.end) if end is not None)
    tokens: list[int] = []
    sampling = SamplingParams(max_tokens=SAMPLE, temperature=0.0, stop_token_ids=ends)
    for new in generate(cfg, for_inference(cfg, params), [prompt.tolist()], [sampling], capacity=room):
        tokens += new.tokens
    return run.model.tokenizer.decode(tokens)


def close(run: "Tuned", state: Any, loop: Loop, was: Look) -> int:
    """Measures again, writes adapter and result, and prints what changed."""
    past, folder = loop.past, run.folder
    signals.set_phase(f"before the last measurement; what was learnt is in {folder}, and the same command measures it.")
    now = look(run, state.trainable)
    reads = run.model.params if run.learner.trainable_paths.adapted else None
    frozen_same = reads is None or digest(reads) == run.base
    if not frozen_same:
        raise RuntimeError(f"Frozen weights changed: their SHA-256 was {run.base}.")
    if run.learner.trainable_paths.adapted:
        place = save_adapter(
            folder / ADAPTER, run.plan.cfg, state.trainable, base=run.base, base_name=run.facts()["base"]["model"]
        )
    else:
        place = folder / "checkpoints" / str(past.step)
    speed = past.step * run.plan.step_tokens / max(past.seconds, 1e-9)
    share = loop.share() or past.step * run.plan.step_flops / max(past.seconds, 1e-9) / loop.job.ceiling
    result = {
        "before": dataclasses.asdict(was), "after": dataclasses.asdict(now), "unit": run.held_out(1).unit, "steps": past.step,
        "train_seconds": past.seconds, "tokens_per_second": speed, "peak_rss_bytes": peak_rss_bytes(),
        "flops_share_of_ceiling": share, "refused_steps": past.refused, "general": run.given.examples.general,
    }  # fmt: skip
    run_folder.write_run_json(folder, run.facts(), result)
    _say(run, result, was, now, Path(str(place)))
    run.chat.close()
    return 0


def _say(run: "Tuned", result: dict[str, Any], was: Look, now: Look, place: Path) -> None:
    console = run.console
    for title, text in (("before", was.answer), ("after", now.answer)):
        console.print()
        console.print(f"{title}: {QUESTION}", style="bold")
        console.print("\n".join(f"  | {line}" for line in text.strip().split("\n")))
    console.print()
    forgotten = "not measured"
    if was.general is not None and now.general is not None:
        forgotten = f"{was.general:.3f} -> {now.general:.3f} bits per byte on {run.given.examples.general}"
    console.print_rows([
        ("learnt", f"{was.held_out:.3f} -> {now.held_out:.3f} {result['unit']} on {run.lessons.held_out_name}"),
        ("forgotten", forgotten),
        ("trained", f"{result['steps']:,} steps, {words.duration(result['train_seconds'])}"
                    + (f", {result['refused_steps']} refused" if result["refused_steps"] else "")),
        ("speed", f"{result['tokens_per_second']:,.0f} tokens/s, {result['flops_share_of_ceiling']:.0%} of the ceiling"),
        ("memory", f"{words.size(result['peak_rss_bytes'])} at most"),
        ("kept", f"{place} ({_numbers(run):,} numbers)"),
    ])  # fmt: skip
    console.print()
    console.print("next", style="bold")
    console.print(f"  {command_line('chat', '--model', run.folder)}")
    console.print(f"  {command_line('evaluate', '--model', run.folder)}")
    console.print(f"  {command_line('export', '--model', run.folder, '--out', run.folder / 'hugging-face')}")


def _numbers(run: "Tuned") -> int:
    tree = run.learner.trainable
    return sum(leaf.size for _, part in leaf_paths(tree).items() for leaf in jax.tree.leaves(part))

"""The end of learning from rewards: what became of the reward, an answer before and after, and what to type next."""

from typing import TYPE_CHECKING, Any

from engine import format as words
from engine.counting.hardware import peak_rss_bytes
from engine.storage.adapter import save_adapter
from engine.storage.digest import digest
from engine.storage.run_folder import ADAPTER
from stages.cli import signals
from stages.cli.command import command_line
from stages.runs import folder as run_folder
from stages.runs import kept

if TYPE_CHECKING:
    from stages.reinforce.rounds import Draw, Rounds
    from stages.reinforce.run import Reinforced

SHOWN = 3  # held-out prompts whose answers are shown
WIDE = 100  # characters of an answer that are


def close(run: "Reinforced", state: Any, rounds: "Rounds", was: "Draw") -> int:
    """Measures again, writes adapter and result, and prints what changed."""
    past, folder = rounds.past, run.folder
    signals.set_phase(f"before the last measurement; what was learnt is in {folder}, and the same command measures it.")
    now = rounds.look(state.trainable, "measuring what it does now")
    if run.learner.trainable_paths.adapted:
        if digest(run.model.params) != run.base:
            raise RuntimeError(f"Frozen weights changed: their SHA-256 was {run.base}.")
        name = kept.lasting(run.given.model)
        place = save_adapter(folder / ADAPTER, run.plan.cfg, state.trainable, base=run.base, base_name=name)
    else:
        place = folder / "checkpoints" / str(past.step)
    drawing = sum(one.draw.seconds for one in rounds.done)
    training = sum(one.training for one in rounds.done)
    result = {
        "held_out_reward_before": was.mean, "held_out_reward_after": now.mean, "best_round": past.best,
        "rounds": past.step, "seconds": past.seconds, "refused_steps": past.refused,
        "inference_seconds": drawing, "training_seconds": training,
        "answer_tokens": sum(one.draw.tokens for one in rounds.done), "peak_rss_bytes": peak_rss_bytes(),
    }  # fmt: skip
    run_folder.write_run_json(folder, run.facts(), result)
    _say(run, result, was, now, str(place))
    run.chat.close()
    return 0


def _say(run: "Reinforced", result: dict[str, Any], was: "Draw", now: "Draw", place: str) -> None:
    console = run.console
    for row in range(min(SHOWN, len(was.texts), len(run.prompts.held_out))):
        console.print()
        console.print(run.prompts.held_out[row].text, style="bold")
        for title, draw in (("before", was), ("after", now)):
            text = " ".join(draw.texts[row].split())
            cut = text if len(text) <= WIDE else text[:WIDE] + "..."
            console.print(f"  {title:<6} {draw.rewards[row]:.2f} | {cut}")
    console.print()
    shares = ""
    drawing, training = result["inference_seconds"], result["training_seconds"]
    if drawing + training:
        shares = f"; inference {drawing / (drawing + training):.0%} of it, training {training / (drawing + training):.0%}"
    console.print_rows([
        ("reward", f"{was.mean:.3f} -> {now.mean:.3f} on prompts that were not learnt from"),
        ("rounds", f"{result['rounds']:,} in {words.duration(result['seconds'])}{shares}"
                   + (f"; {result['refused_steps']} steps refused" if result["refused_steps"] else "")),
        ("memory", f"{words.size(result['peak_rss_bytes'])} at most"),
        ("kept", place),
    ])  # fmt: skip
    console.print()
    console.print("next", style="bold")
    console.print(f"  {command_line('chat', '--model', run.folder)}")
    console.print(f"  {command_line('export', '--model', run.folder, '--out', run.folder / 'hugging-face')}")

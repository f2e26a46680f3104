"""The last screen of learning from rewards: the reward before and after, some completions, and what to type next."""

from collections.abc import Sequence
from pathlib import Path

from engine.counting.hardware import peak_rss_bytes
from engine.format import duration, size
from stages.cli.command import command_line
from stages.reinforce.data import Prompt
from stages.reinforce.rollouts import Rollout
from stages.reinforce.rounds import Round
from stages.runs.loop import LoopState
from stages.runs.run import RunReport

SHOWN = 3  # held-out prompts whose completions are shown
WIDE = 100  # characters of a completion that are


def rewards_report(
    loop_state: LoopState, rounds: Sequence[Round], held_out: Sequence[Prompt], before: Rollout, after: Rollout, place: Path,
    folder: Path,
) -> RunReport:  # fmt: skip
    """Returns result and last screen. `before` and `after` are rollouts of `held_out`; `place` holds what was trained."""
    inference = sum(played.rollout.seconds for played in rounds)
    training = sum(played.training_seconds for played in rounds)
    peak = peak_rss_bytes()
    result = {
        "held_out_reward_before": before.mean_reward, "held_out_reward_after": after.mean_reward,
        "best_round": loop_state.best, "rounds": loop_state.step, "seconds": loop_state.seconds,
        "refused_steps": loop_state.refused, "inference_seconds": inference, "training_seconds": training,
        "answer_tokens": sum(played.rollout.tokens for played in rounds), "peak_rss_bytes": peak,
    }  # fmt: skip
    texts = []
    for row in range(min(SHOWN, len(before.texts), len(held_out))):
        lines = []
        for title, rollout in (("before", before), ("after", after)):
            text = " ".join(rollout.texts[row].split())
            cut = text if len(text) <= WIDE else text[:WIDE] + "..."
            lines.append(f"{title:<6} {rollout.rewards[row]:.2f} | {cut}")
        texts.append((held_out[row].text, lines))
    both = inference + training
    shares = f"; inference {inference / both:.0%} of it, training {training / both:.0%}" if both else ""
    refused = f"; {loop_state.refused} steps refused" if loop_state.refused else ""
    rows = [
        ("reward", f"{before.mean_reward:.3f} -> {after.mean_reward:.3f} on held-out prompts"),
        ("rounds", f"{loop_state.step:,} in {duration(loop_state.seconds)}{shares}{refused}"),
        ("memory", f"{size(peak)} at most"),
        ("saved", str(place)),
    ]
    commands = [
        command_line("chat", "--model", folder),
        command_line("export", "--model", folder, "--out", folder / "hugging-face"),
    ]
    return RunReport(result, texts, rows, commands)

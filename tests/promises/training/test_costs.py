"""T11 and T14: what saving costs a run, and the peak of its memory beside what its first lines say."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.promises.figures import at_least, at_most
from tests.stages.tiny_runs import ROOT, typed, write_text

UNITS = {"MB": 1e6, "GB": 1e9}


@pytest.mark.promises(name="T14")
def test_memory_is_as_planned(text, tmp_path, quick, expect, pytestconfig):
    """From random weights with both optimizers, a LoRA on int8, and from rewards; over a save and
    an evaluation.
    """
    conversations = tmp_path / "chats.jsonl"
    said = lambda number: [("user", f"Sea {number}?"), ("assistant", f"{number} ships with red sails.")]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in said(number)]}
        for number in range(100)
    ]
    conversations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = write_text(tmp_path / "validation.txt", lines=40)
    shape = ("--batch", 1, "--context", 128, "--steps", 5, "--eval-every", 3)
    trained = lambda preset, kind: (
        "train",
        preset,
        "--optimizer",
        kind,
        "--data",
        text,
        "--validation",
        validation,
        "--tokenizer",
        "bytes",
        "--accumulate",
        1,
        *shape,
    )
    adapted = lambda model: (
        "finetune",
        "--model",
        model,
        "--data",
        conversations,
        "--general",
        "none",
        "--lora",
        "rank=8",
        "--base",
        "int8",
        *shape,
    )
    model = pytestconfig.getoption("--promises-model")
    presets = ["nano", "smollm2-135m"] + ["smollm2-360m"] * (not quick)
    commands = {
        f"{preset}, {kind}": trained(preset, kind) for preset in presets for kind in ("adamw", "muon")
    }
    commands |= {"nano, LoRA": adapted(tmp_path / "nano, muon"), "SmolLM2, LoRA": adapted(model)}
    commands |= {"SmolLM2, rewards": ("reinforce", "--task", "length:12", "--model", model, "--rounds", 3)}
    ratios = {}
    for name, words in commands.items():
        folder = tmp_path / name
        run = subprocess.run(
            typed(*words, "--out-dir", folder), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        planned, unit = re.search(
            r"([\d.]+) ([MG]B) in all with Python", " ".join(run.stdout.split())
        ).groups()
        peak = json.loads((folder / "run.json").read_text())["result"]["peak_rss_bytes"]
        ratios[name] = peak / (float(planned) * UNITS[unit])
        if "nano" not in name:
            shutil.rmtree(folder)  # of gigabytes
    expect(
        at_most("peak over plan, most", max(ratios.values()), 1.15),
        at_least("peak over plan, least", min(ratios.values()), 0.85),
        over=", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
    )


@pytest.mark.promises(name="T11")
def test_saving_beside_training(tmp_path, quick, expect):
    """`python -m bench.step --of saving`: 135 million parameters with AdamW; few with --quick."""
    few = ("--preset", "nano", "--rounds", "6", "--interval", "10") if quick else ()
    words = [sys.executable, "-m", "bench.step", "--of", "saving", "--json", *few]
    output = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = json.loads(output)
    shares = {name: f"{share:.1%}" for name, share in found["shares_of_interval"].items()}
    over = f"{found['state_bytes'] / 1e9:.2f} GB every {found['interval']:g} s; slowed {shares['slowed']}"
    expect(at_most("stopped", 100 * found["shares_of_interval"]["stopped"], 2, "%"), over=over)

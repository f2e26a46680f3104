"""T14: the peak of a real run's resident memory beside what its first lines say."""

import json
import re
import shutil
import subprocess

import pytest
from figures import at_least, at_most
from tiny_runs import ROOT, typed, write_text

UNITS = {"MB": 1e6, "GB": 1e9}


@pytest.mark.promises("T14", "memory stays within the plan")
def test_memory_is_as_planned(text, tmp_path, quick, expect, pytestconfig):
    """From random weights with both optimizers, a LoRA on int8, and from rewards; over a save and an evaluation."""
    conversations = tmp_path / "chats.jsonl"
    said = lambda number: [("user", f"Sea {number}?"), ("assistant", f"{number} ships with red sails.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in said(number)]} for number in range(100)]
    conversations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = write_text(tmp_path / "validation.txt", lines=40)
    shape = ("--batch", 1, "--context", 128, "--steps", 5, "--eval-every", 3)
    trained = lambda preset, kind: (
        "train", preset, "--optimizer", kind, "--data", text, "--validation", validation, "--tokenizer", "bytes",
        "--accumulate", 1, *shape,
    )  # fmt: skip
    adapted = lambda model: (
        "finetune", "--model", model, "--data", conversations, "--general", "none", "--lora", "rank=8", "--base", "int8",
        *shape,
    )  # fmt: skip
    model = pytestconfig.getoption("--promises-model")
    presets = ["nano", "smollm2-135m"] + ["smollm2-360m"] * (not quick)
    commands = {f"{preset}, {kind}": trained(preset, kind) for preset in presets for kind in ("adamw", "muon")}
    commands |= {"nano, LoRA": adapted(tmp_path / "nano, muon"), "SmolLM2, LoRA": adapted(model)}
    commands |= {"SmolLM2, rewards": ("reinforce", "--task", "length:12", "--model", model, "--rounds", 3)}
    ratios = {}
    for name, words in commands.items():
        folder = tmp_path / name
        run = subprocess.run(typed(*words, "--out-dir", folder), cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        planned, unit = re.search(r"([\d.]+) ([MG]B) in all with Python", " ".join(run.stdout.split())).groups()
        peak = json.loads((folder / "run.json").read_text())["result"]["peak_rss_bytes"]
        ratios[name] = peak / (float(planned) * UNITS[unit])
        if "nano" not in name:
            shutil.rmtree(folder)  # of gigabytes
    expect(
        at_most("peak over plan, most", max(ratios.values()), 1.15),
        at_least("peak over plan, least", min(ratios.values()), 0.85),
        over=", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
    )

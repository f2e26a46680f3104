"""T14: the peak of a real run's resident memory beside what its first lines say."""

import json
import re
import subprocess

import pytest
from figures import at_least, at_most
from tiny_runs import ROOT, typed, write_text

UNITS = {"MB": 1e6, "GB": 1e9}


@pytest.mark.promises("T14", "memory stays within the plan")
def test_memory_is_as_planned(text, tmp_path, quick, expect, pytestconfig):
    """From random weights with both optimizers, and a LoRA on int8; over a save and an evaluation."""
    conversations, folder = tmp_path / "chats.jsonl", tmp_path / "run"
    said = lambda number: [("user", f"Sea {number}?"), ("assistant", f"{number} ships with red sails.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in said(number)]} for number in range(100)]
    conversations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = write_text(tmp_path / "validation.txt", lines=40)
    shape = ("--batch", 1, "--context", 128, "--steps", 5, "--eval-every", 3, "--out-dir", folder, "--overwrite")
    trained = lambda preset, kind: (
        "train", preset, "--optimizer", kind, "--data", text, "--validation", validation, "--tokenizer", "bytes",
        "--accumulate", 1,
    )  # fmt: skip
    model = pytestconfig.getoption("--promises-model")
    lora = ("finetune", "--model", model, "--data", conversations, "--general", "none", "--lora", "rank=8", "--base", "int8")
    presets = ["smollm2-135m"] + ["smollm2-360m"] * (not quick)
    ratios = {}
    for words in [*(trained(preset, kind) for preset in presets for kind in ("adamw", "muon")), lora]:
        run = subprocess.run(typed(*words, *shape), cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        planned, unit = re.search(r"([\d.]+) ([MG]B) in all with Python", " ".join(run.stdout.split())).groups()
        peak = json.loads((folder / "run.json").read_text())["result"]["peak_rss_bytes"]
        ratios[" ".join(map(str, words[1:4]))] = peak / (float(planned) * UNITS[unit])
    expect(
        at_most("peak over plan, most", max(ratios.values()), 1.15),
        at_least("peak over plan, least", min(ratios.values()), 0.85),
        over=", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
    )

"""T4, T7, T10 and T11: what a run is a function of, what it leaves alone, and what saving costs it."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from figures import at_most, exactly
from fork_server import ROOT
from many_processes import FLAGS, finish
from tiny_runs import tiny
from tiny_training import Fault, bits

from engine.model.config import LoraConfig
from engine.model.paths import leaf_paths, merge
from engine.model.transformer import forward
from engine.storage.model_loader import load_model
from engine.training.lora import init_lora

# Runs before the command: each batch that is made leaves its step, and a digest of each row.
NOTE = """
import hashlib
from engine.text.batch import TextBatches
at = TextBatches.at
def noted(self, step, *rows):
    batch = at(self, step, *rows)
    rows = (b"".join(leaf[row].tobytes() for leaf in batch[:4]) for row in range(len(batch[0])))
    with open("{file}", "a") as file:
        print(step, *(hashlib.sha256(row).hexdigest() for row in rows), file=file)
    return batch
TextBatches.at = noted
"""


@pytest.mark.promises("T4", "the order of the data is a function of seed and step alone")
def test_the_order_of_the_data(make_run, start, text, tmp_path, quick, expect):
    """Batches by step: uninterrupted, killed at a third and resumed, longer with other intervals, in processes."""
    length = ("--steps", 30, "--log-every", 1)
    ways = {"whole": (), "resumed": ("--save-every", 5), "longer": ("--steps", 40, "--eval-every", 3)}
    orders = {}
    for name, words in ways.items():
        run, file = make_run(*words, length=length), tmp_path / name
        if name == "resumed":
            assert run.live(Fault(130), NOTE.format(file=file)) == 77
        assert run.live(patch=NOTE.format(file=file)) == 0, run.output.read_text()
        orders[name] = read_order(file)
    for count in (2,) if quick else (2, 4):
        name = f"{count} processes"
        note = lambda process: NOTE.format(file=tmp_path / f"{name} {process}")  # noqa: B023
        words = tiny(text, tmp_path / str(count), *FLAGS, "--tokenizer", "bpe:300")
        codes, errors = finish(start(count, "train", *words, patch=note))
        assert codes == {0}, errors
        parts = [dict(read_order(tmp_path / f"{name} {process}")) for process in range(count)]
        orders[name] = {(step, sum((part[step] for part in parts), ())) for step in parts[0]}
    known = dict(orders["longer"])
    different = sum(known[step] != digests for order in orders.values() for step, digests in order)
    expect(exactly("other batches", different, 0), over=f"{len(known)} steps, {', '.join(orders)}")


def read_order(file: Path) -> set[tuple[str, tuple[str, ...]]]:
    """Each step with the digests of its rows."""
    return {(words[0], tuple(words[1:])) for line in file.read_text().splitlines() if (words := line.split())}


@pytest.mark.promises("T7", "the same configuration on the same machine gives the same bits")
def test_two_processes(make_run, text, side_by_side, expect):
    """100 steps in processes of their own, two at a time, by Muon and AdamW. By default the clock decides when to evaluate."""
    length = ("--steps", 100, "--log-every", 1, "--eval-every", 20)
    runs = {name: [make_run("--optimizer", name, server=half, length=length) for half in (0, 1)] for name in ("muon", "adamw")}

    def train(half: int) -> None:
        for name in runs:
            words = [sys.executable, "-m", "stages.train", *runs[name][half].words]
            subprocess.run(words, cwd=ROOT, check=True, capture_output=True)

    side_by_side(train, (0, 1))
    different = sum(bits(a.folder) != bits(b.folder) for a, b in runs.values())
    expect(exactly("pairs that differ in a bit", different, 0), over="2 pairs of 100 steps; there is no slower mode to ask for")


T10 = ("T10", "what is frozen stays to the bit; an adapter begins as the identity, a preference at ln 2")


@pytest.mark.promises(*T10)
def test_what_is_frozen(make_tuning, base, quick, expect):
    """Frozen layers, and the base of a LoRA, after steps with decay, clipping and momentum; and an adapter before the first."""
    model, steps, moved, count = load_model(str(base)), 50 if quick else 1000, 0, 0
    before, lora = leaf_paths(model.params), LoraConfig(4, 16.0, ("all",))
    hard = ("--learning-rate", 0.01, "--weight-decay", 0.3, "--clip", 0.5, "--steps", steps)
    for words in (("--freeze", "bottom:1"), ("--lora", "rank=4,alpha=16,targets=all")):
        run = make_tuning(0, (*hard, *words))
        assert run.live() == 0, run.output.read_text()
        after = leaf_paths(load_model(str(run.folder)).params)
        frozen = [path for path in before if "--lora" in words or path.startswith(("embed", "blocks/0/"))]
        leaves = {path: getattr(after[path], "base", after[path]) for path in frozen}
        moved += sum(np.asarray(leaves[path]).tobytes() != np.asarray(before[path]).tobytes() for path in frozen)
        count += len(frozen)
    cfg = dataclasses.replace(model.cfg, dtype="float32")
    adapted = merge(init_lora(cfg, jax.random.key(0), lora), model.params)
    tokens, positions = np.arange(20)[None], np.arange(20)[None]
    logits = [np.asarray(forward(cfg, params, tokens, positions)[0]) for params in (model.params, adapted)]
    expect(
        exactly("frozen leaves that moved", moved, 0),
        at_most("logits moved by an untrained adapter", float(abs(logits[0] - logits[1]).max()), 1e-6),
        over=f"{count} leaves after {steps} steps",
    )


@pytest.mark.promises(*T10)
def test_preferences_begin_at_ln_2(make_tuning, tmp_path, expect):
    pairs = tmp_path / "pairs.jsonl"
    pair = lambda prompt: json.dumps({"prompt": prompt, "chosen": "red sails.", "rejected": "a far land."}) + "\n"
    pairs.write_text(pair("the sea") + pair("the king"))
    run = make_tuning(0, ("--steps", 1, "--objective", "preference", "--data", pairs))
    assert run.live() == 0, run.output.read_text()
    expect(at_most("first preference loss less ln 2", abs(run.rows()[0]["loss"] - math.log(2)), 1e-6))


@pytest.mark.promises("T11", "saving runs beside training")
def test_saving_beside_training(tmp_path, quick, expect):
    """`python -m bench.step --of saving`: 135 million parameters with AdamW; few with --quick."""
    few = ("--preset", "nano", "--rounds", "6", "--interval", "10") if quick else ()
    words = [sys.executable, "-m", "bench.step", "--of", "saving", "--json", *few]
    output = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = json.loads(output)
    shares = {name: f"{share:.1%}" for name, share in found["shares_of_interval"].items()}
    over = f"{found['state_bytes'] / 1e9:.2f} GB every {found['interval']:g} s; slowed {shares['slowed']}"
    expect(at_most("stopped", 100 * found["shares_of_interval"]["stopped"], 2, "%"), over=over)

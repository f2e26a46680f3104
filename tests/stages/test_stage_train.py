"""Training from the command line: plan, run, result, and going on to the bit."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_runs import ROOT, metrics, tiny, typed

from engine.model.transformer import init_params
from engine.storage import checkpoint, manifest
from engine.storage.digest import digest
from engine.storage.run_folder import read_config, read_json
from engine.text.corpus import read_corpus
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state
from stages.cli.console import Console
from stages.runs import loop
from stages.runs.text_data import make_tokenizer
from stages.runs.steps import TrainingSteps
from stages.train import __main__ as train

RESULT = ("val_bits_per_byte", "train_seconds", "first_step_seconds", "peak_rss_bytes", "tokens_per_second", "mfu")


def state_digest(folder: Path) -> str:
    """Of weights and optimizer in a run's newest checkpoint, with its step."""
    cfg = read_config(folder)
    tx = make_optimizer(OptimizerConfig(**read_json(folder / "run.json")["recipe"]["optimizer"]))
    like = jax.eval_shape(lambda: init_state(tx, init_params(cfg, jax.random.key(0))))
    loaded = checkpoint.load(folder, like.trainable, like.opt_state)
    assert not loaded.damaged
    return f"{loaded.step} {digest(loaded.params)} {digest(loaded.optimizer)}"


def test_run_leaves_what_it_says(trained):
    run = read_json(trained / "run.json")
    assert list(run)[-1] == "result"
    assert all(isinstance(run["result"][name], int | float) and run["result"][name] > 0 for name in RESULT)
    assert run["result"]["val_bits_per_byte"] < 7
    assert read_config(trained).vocab == 300
    assert (trained / "tokenizer" / "tokenizer.json").exists()
    assert (trained / "samples" / "20.txt").exists()
    lines = metrics(trained)
    assert [line["step"] for line in lines if "loss" in line] == [10, 20]
    validation = {line["step"]: line[key] for line in lines if (key := "quick_val_bits_per_byte") in line}
    best = min(validation, key=lambda step: validation[step])
    assert [*validation][-1] == run["result"]["best_step"] == best == 20, "the last counts too"
    assert checkpoint.steps(trained)[-1] == 20


@pytest.mark.journeys
def test_memory_stays_within_the_plan(text, tmp_path):
    """The buffer of a step lies in the place of the last one's: the peak over some steps and a save is no more than printed."""
    folder, printed = tmp_path / "run", tmp_path / "printed"
    words = typed("train", "nano", "--data", text, "--tokenizer", "bytes", "--out-dir", folder, "--scan", "--save-every", 2)
    words += map(str, ("--batch", 4, "--context", 256, "--steps", 10**6, "--eval-every", 10**6, "--log-every", 1))
    with printed.open("w") as file, subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file) as process:
        for lines in (1, 5):
            while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < lines:
                assert process.poll() is None, printed.read_text()
                time.sleep(0.1)
            if lines == 1:  # compiling may have taken more, which promise T14 measures
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()
    planned = re.search(r"([\d.]+) ([MG])B in all with Python", " ".join(printed.read_text().split()))
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    assert peak < 1.05 * float(planned[1]) * {"M": 1e6, "G": 1e9}[planned[2]]


def test_resumed_is_uninterrupted_to_the_bit(text, tmp_path, monkeypatch, capsys):
    steps = ["--steps", 6, "--save-every", 100]
    assert train.main(tiny(text, tmp_path / "whole", *steps)) == 0
    parts = tmp_path / "parts"
    with monkeypatch.context() as stopping:
        interrupt_after(stopping, 3, signal.SIGINT)
        capsys.readouterr()
        assert train.main(tiny(text, parts, *steps)) == 130
    output = capsys.readouterr().out
    assert "Stopped at step 3" in output
    assert f"To go on: python -m stages.train tiny --data {text}" in output
    assert checkpoint.steps(parts)[-1] == 3
    assert "result" not in read_json(parts / "run.json")
    with monkeypatch.context() as stopping:
        interrupt_after(stopping, 5, signal.SIGTERM)
        assert train.main(tiny(text, parts, *steps)) == 143
    assert "resumed at step 3" in capsys.readouterr().out
    assert checkpoint.steps(parts)[-1] == 5
    assert train.main(tiny(text, parts, *steps)) == 0
    assert "resumed at step 5" in capsys.readouterr().out
    assert state_digest(parts) == state_digest(tmp_path / "whole")
    unbroken, part = (read_json(folder / "run.json")["result"] for folder in (tmp_path / "whole", parts))
    assert unbroken["val_bits_per_byte"] == part["val_bits_per_byte"]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """The process sends itself a signal in the middle of the loop."""
    count = loop.Loop._count

    def counting(self: loop.Loop, *args: Any) -> None:
        count(self, *args)
        if self.loop_state.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Loop, "_count", counting)


def test_finished_run_says_so_and_goes_on_with_more_steps(trained, text, tmp_path, capsys):
    folder = tmp_path / "sea"
    shutil.copytree(trained, folder)
    same = tiny(text, folder, "--tokenizer", "bpe:300", "--context", 64)
    before, batch = (folder / "run.json").read_bytes(), same.index("--batch")
    # A batch that is not said is the run's: the preset's would be 8 here, and more on a mesh that 8 is no multiple of.
    assert train.main([*same[:batch], *same[batch + 2 :], "--steps", "20"]) == 0
    assert "This run is finished: 20 steps" in capsys.readouterr().out
    assert (folder / "run.json").read_bytes() == before
    assert train.main([*same, "--steps", "23"]) == 0
    assert "resumed at step 20" in capsys.readouterr().out
    assert read_json(folder / "run.json")["result"]["steps"] == 23
    assert train.main([*same, "--steps", "2", "--overwrite"]) == 0
    assert checkpoint.steps(folder) == [1, 2]
    assert {line["step"] for line in metrics(folder)} <= {1, 2}


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(text, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main(tiny(text, folder, "--steps", 4, "--save-every", 2)) == 0
    assert checkpoint.steps(folder) == [2, 4]
    victim = folder / "checkpoints" / "4" / "params.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0\0")
    capsys.readouterr()
    # The run was finished, but what it finished with is not there any more: the same command makes it again.
    assert train.main(tiny(text, folder, "--steps", 4, "--learning-rate", "0.001")) == 0
    output = capsys.readouterr().out
    assert f"damaged: {victim}" in output
    assert "resumed at step 2 (the newest intact one)" in output
    assert "changed: learning_rate: 0.003 -> 0.001" in output
    assert (folder / "checkpoints" / "damaged-4").exists()
    assert manifest.verify(folder / "checkpoints" / "4") == []


def test_time_boxed_run_counts_training_only(text, tmp_path, capsys):
    assert train.main(tiny(text, tmp_path / "run", "--max-time", "1s", "--eval-every", "20")) == 0
    result = read_json(tmp_path / "run" / "run.json")["result"]
    assert 1 <= result["train_seconds"] < 2
    steps = [line for line in metrics(tmp_path / "run") if "learning_rate_factor" in line]  # others are of evaluations
    assert steps[-1]["learning_rate_factor"] < 0.1  # the schedule follows the time
    assert "epoch" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_leaves_nothing(text, tmp_path, capsys):
    assert train.main(tiny(text, tmp_path / "run", "--dry-run")) == 0
    output = capsys.readouterr().out
    for word in ("device", "parameters", "trainable", "frozen", "FLOPs", "memory", "predicted", "epochs", "time-boxed"):
        assert word in output
    assert not (tmp_path / "run").exists()


def test_flags_change_the_recipe(text, tmp_path):
    more = ["--optimizer", "adamw", "--learning_rate", "0.002", "--schedule", "cosine", "--dtype", "float32"]
    more += ["--accumulate", "2", "--scan", "--remat", "--clip", "inf", "--seed", "7", "--steps", "2", "--max-time", "1h"]
    assert train.main(tiny(text, tmp_path / "run", *more)) == 0
    assert checkpoint.steps(tmp_path / "run") == [2]  # whichever limit comes first ends a run
    run, config = (read_json(tmp_path / "run" / name) for name in ("run.json", "config.json"))
    optimizer = run["recipe"]["optimizer"]
    assert (optimizer["kind"], optimizer["learning_rate"], optimizer["schedule"]) == ("adamw", 0.002, "cosine")
    assert (run["seed"], run["recipe"]["batch"], run["recipe"]["accumulate"]) == (7, 4, 2)
    assert (config["dtype"], config["scan"], config["remat"], config["context"]) == ("float32", True, "block", 32)


def test_steps_that_are_not_finite_end_the_run_and_keep_the_checkpoint(text, tmp_path, monkeypatch, failing):
    folder = tmp_path / "run"
    assert train.main(tiny(text, folder, "--steps", 2)) == 0
    before = state_digest(folder)
    run = TrainingSteps.run
    monkeypatch.setattr(TrainingSteps, "run", lambda self, *args: (run(self, *args)[0], [True]))
    error = failing(train.main, tiny(text, folder, "--steps", 50, "--save-every", 100))
    assert "10 steps in a row" in error
    assert "--learning-rate" in error
    assert state_digest(folder) == before


def test_a_tokenizer_in_the_cache_that_was_changed_is_made_anew(text, tmp_path, monkeypatch):
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path))
    learn = lambda: make_tokenizer("bpe:300", read_corpus(text), Console(io.StringIO())).digest
    digest = learn()
    (file,) = tmp_path.glob("tokenizers/*/tokenizer.json")
    fields = json.loads(whole := file.read_text())
    fields["model"]["merges"].reverse()  # still a tokenizer
    file.write_text(json.dumps(fields))
    assert learn() == digest
    assert file.read_text() == whole

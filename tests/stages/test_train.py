"""Training from the command line: plan, run, and result."""

import io
import itertools
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import UserError
from engine.processor import CoreTime
from engine.storage import checkpoint
from engine.storage.run_folder import read_config, read_json
from engine.text.corpus import read_corpus
from engine.text.tokenizer import Tokenizer
from stages.cli.console import Console
from stages.runs import text_data
from stages.runs.text_data import make_tokenizer
from stages.train import __main__ as train
from tests.stages.tiny_runs import ROOT, metrics, tiny, typed

RESULT = (
    "val_bits_per_byte",
    "train_seconds",
    "training_flops",
    "first_step_seconds",
    "peak_rss_bytes",
    "tokens_per_second",
    "mfu",
)


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


# by day tests/laws and tests/training hold what a step donates; promise T14 has more runs
@pytest.mark.night
@pytest.mark.journeys
def test_memory_stays_within_the_plan(text, tmp_path):
    """The buffer of a step lies in the place of the last one's: the peak over some steps and a save
    is no more than printed.
    """
    folder, printed = tmp_path / "run", tmp_path / "printed"
    words = typed(
        "train",
        "nano",
        "--data",
        text,
        "--tokenizer",
        "bytes",
        "--out-dir",
        folder,
        "--scan",
        "--save-every",
        2,
    )
    words += map(
        str, ("--batch", 4, "--context", 256, "--steps", 10**6, "--eval-every", 10**6, "--log-every", 1)
    )
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


def test_time_boxed_run_counts_training_only(text, tmp_path, monkeypatch, capsys):
    """By a clock that moves 0.01 s when it is read: once in a step, and more often in an
    evaluation.
    """
    ticks = itertools.count()
    monkeypatch.setattr("stages.runs.loop.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100))
    assert train.main(tiny(text, tmp_path / "run", "--max-time", "1s", "--eval-every", "20")) == 0
    result = read_json(tmp_path / "run" / "run.json")["result"]
    assert 1 <= result["train_seconds"] < 1.02
    assert 98 <= result["steps"] <= 100
    steps = [
        line for line in metrics(tmp_path / "run") if "learning_rate_factor" in line
    ]  # others are of evaluations
    assert steps[-1]["learning_rate_factor"] < 0.1  # the schedule follows the time
    assert "epoch" in capsys.readouterr().out


@pytest.mark.whole
@pytest.mark.parametrize(("others", "is_said"), [(0.4, True), (0.1, False), (None, False)])
def test_a_busy_machine_is_said_beside_the_prediction_and_what_came_of_it(
    others, is_said, text, tmp_path, monkeypatch, capsys
):
    seconds = itertools.count(100)

    def core_time() -> CoreTime | None:
        now = 10.0 * next(seconds)
        return None if others is None else CoreTime(now, others * now)

    monkeypatch.setattr("stages.runs.progress.core_time", core_time)
    monkeypatch.setattr("stages.runs.progress.PREDICTS_AFTER_SECONDS", 0)
    monkeypatch.setattr("stages.runs.progress.PREDICTS_AFTER_STEPS", 0)
    assert train.main(tiny(text, tmp_path / "run", "--steps", 3)) == 0
    note = "; this machine is busy: others took 40% of its cores" * is_said
    printed = capsys.readouterr().out
    assert re.search(rf"\npredicted +3 steps in \S+ s, as the first 2 went{note}\n", printed), printed
    assert re.search(rf"\ntrained +3 steps in \S+ s \(3 in \S+ s predicted\){note}\n", printed), printed


def test_dry_run_prints_the_plan_and_leaves_nothing(text, tmp_path, capsys):
    assert train.main(tiny(text, tmp_path / "run", "--dry-run")) == 0
    output = capsys.readouterr().out
    for word in (
        "device",
        "parameters",
        "trainable",
        "frozen",
        "FLOPs",
        "memory",
        "predicted",
        "epochs",
        "time-boxed",
    ):
        assert word in output
    assert not (tmp_path / "run").exists()


@pytest.mark.whole
def test_flags_change_the_recipe(text, tmp_path):
    more = ["--optimizer", "adamw", "--learning_rate", "0.002", "--schedule", "cosine", "--dtype", "float32"]
    more += [
        "--accumulate",
        "2",
        "--scan",
        "--remat",
        "--clip",
        "inf",
        "--seed",
        "7",
        "--steps",
        "2",
        "--max-time",
        "1h",
    ]
    assert train.main(tiny(text, tmp_path / "run", *more)) == 0
    assert checkpoint.steps(tmp_path / "run") == [2]  # whichever limit comes first ends a run
    run, config = (read_json(tmp_path / "run" / name) for name in ("run.json", "config.json"))
    optimizer = run["recipe"]["optimizer"]
    assert (optimizer["kind"], optimizer["learning_rate"], optimizer["schedule"]) == (
        "adamw",
        0.002,
        "cosine",
    )
    assert (run["seed"], run["recipe"]["batch"], run["recipe"]["accumulate"]) == (7, 4, 2)
    assert (config["dtype"], config["scan"], config["remat"], config["context"]) == (
        "float32",
        True,
        "block",
        32,
    )


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


def test_a_tokenizer_of_a_text_that_was_edited_meanwhile_is_not_kept(text, tmp_path, monkeypatch):
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path / "cache"))
    edited = tmp_path / "edited.txt"
    edited.write_bytes(text.read_bytes())
    learn = lambda: make_tokenizer("bpe:300", read_corpus(edited), Console(io.StringIO())).digest
    real = text_data.train_bpe

    def edit_and_train(parts: Iterator[str], vocab: int) -> Tokenizer:
        edited.write_text("another text\n" * 100)
        return real(parts, vocab)

    with monkeypatch.context() as patch:
        patch.setattr(text_data, "train_bpe", edit_and_train)
        with pytest.raises(
            UserError, match=r"edited.txt was changed while it was read, so its tokenizer was not kept"
        ):
            learn()
    of_another_text = learn()
    edited.write_bytes(text.read_bytes())
    assert learn() != of_another_text

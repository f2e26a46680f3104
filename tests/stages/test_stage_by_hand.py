"""Training by hand from the command line: the same run as JAX's, step for step, and a model that other commands read."""

import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from test_stage_train import interrupt_after
from tiny_runs import metrics, tiny

from engine.storage import checkpoint
from engine.storage.digest import digest
from engine.storage.run_folder import read_json
from stages import evaluate, generate
from stages.train import __main__ as train

STEPS = 12


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


@pytest.fixture(scope="module")
def by_hand(text, tmp_path_factory):
    """The run folder of a finished run by hand. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "hand"
    assert train.main(tiny(text, folder, "--by-hand", "--steps", STEPS, "--log-every", 1)) == 0
    return folder


def test_the_steps_are_those_of_jax(by_hand, text, tmp_path):
    same = ["--steps", STEPS, "--log-every", 1, "--optimizer", "adamw", "--dtype", "float32"]
    assert train.main(tiny(text, tmp_path / "jax", *same)) == 0
    assert len(losses(by_hand)) == STEPS
    np.testing.assert_allclose(losses(by_hand), losses(tmp_path / "jax"), rtol=1e-4)
    assert losses(by_hand)[-1] < losses(by_hand)[0] - 0.5
    ours, theirs = (read_json(folder / "run.json")["result"] for folder in (by_hand, tmp_path / "jax"))
    assert abs(ours["val_bits_per_byte"] - theirs["val_bits_per_byte"]) < 1e-3


def test_other_commands_read_the_run(by_hand, capsys):
    assert evaluate.main(["--model", str(by_hand)]) == 0
    output = capsys.readouterr().out
    assert f"{read_json(by_hand / 'run.json')['result']['val_bits_per_byte']:.4f}" in output
    sample = (by_hand / "samples" / f"{STEPS}.txt").read_bytes()
    prompt, completion = sample[:8].decode(), sample[8:].decode()  # bytes are tokens, of which a quarter context is given
    arguments = ["--model", str(by_hand), "--prompt", prompt, "--temperature", "0", "--max-tokens", "160"]
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out == completion + "\n"


def test_what_it_says(text, tmp_path, capsys):
    args = tiny(text, tmp_path / "run", "--by-hand")[1:]  # without a preset
    assert train.main([*args, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for word in ("NumPy", "tiny: 2 layers", "float32", "adamw", "keeps", "for its backward pass", "1 min of training"):
        assert word in plan
    assert not (tmp_path / "run").exists()
    assert train.main([*args, "--steps", "2"]) == 0
    output = capsys.readouterr().out
    assert "step 1/2  loss 5.5" in output
    assert "compiling" not in output
    by_numpy, by_jax = re.search(r"one model +(\d\.\d{4}) bits per byte .* by NumPy, (\d\.\d{4}) by JAX", output).groups()
    assert by_numpy == by_jax
    assert "stages.train tiny --optimizer adamw --dtype float32, with the same other flags, takes the same steps" in output


def test_it_goes_on_where_it_stopped(by_hand, text, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "parts"
    same = tiny(text, folder, "--by-hand", "--steps", STEPS, "--log-every", 1)
    with monkeypatch.context() as stopping:
        interrupt_after(stopping, 5, signal.SIGINT)
        assert train.main(same) == 130
    assert checkpoint.steps(folder)[-1] == 5
    assert train.main(same) == 0
    assert "resumed at step 5" in capsys.readouterr().out
    assert digest(checkpoint.load_params(folder).params) == digest(checkpoint.load_params(by_hand).params)


OTHERS = ["--scan", "--remat", "--accumulate 2", "--dtype bfloat16", "--optimizer muon", "--matrix-learning-rate 0.1"]


@pytest.mark.parametrize("flags", [*OTHERS, "--device gpu"])
def test_flags_of_the_other_step(flags, text, tmp_path, failing):
    error = failing(train.main, tiny(text, tmp_path / "run", "--by-hand", *flags.split()))
    assert f"--by-hand does not go with {re.sub(r' [0-9.]+$', '', flags)}: " in error
    assert not (tmp_path / "run").exists()


def test_more_than_fits(text, tmp_path, failing):
    error = failing(train.main, tiny(text, tmp_path / "run", "--by-hand", "--batch", 50_000_000))
    assert "kept by the forward pass for the backward pass" in error
    assert "smaller --batch" in error


def test_the_two_do_not_go_on_with_each_other(by_hand, text, tmp_path, failing):
    folder = tmp_path / "hand"
    shutil.copytree(by_hand, folder)
    for optimizer in ("adamw", "muon"):
        error = failing(train.main, tiny(text, folder, "--optimizer", optimizer))
        assert f"another optimizer (adamw by hand there, {optimizer} now)" in error


def test_a_step_that_is_not_finite_changes_nothing(by_hand, text, tmp_path, monkeypatch, failing):
    from engine import by_hand as model

    folder = tmp_path / "hand"
    shutil.copytree(by_hand, folder)
    before = digest(checkpoint.load_params(folder).params)
    original = model.loss_and_gradient
    monkeypatch.setattr(model, "loss_and_gradient", lambda *args: (float("nan"), original(*args)[1]))
    error = failing(train.main, tiny(text, folder, "--by-hand", "--steps", 40))
    assert "10 steps in a row" in error
    assert digest(checkpoint.load_params(folder).params) == before

"""Training by hand from the command line: the losses of the same run in JAX, and a model that other commands read."""

import re

import numpy as np
import pytest

from engine import by_hand as model
from stages import by_hand, generate
from stages.evaluate import __main__ as evaluate
from stages.train import __main__ as train
from tests.stages.tiny_runs import metrics, tiny

STEPS = 12


@pytest.mark.whole
def test_the_losses_are_those_of_jax_and_other_commands_read_the_model(text, tmp_path, capsys, failing):
    size, out = (
        ["--data", text, "--batch", 4, "--context", 32, "--steps", STEPS, "--log-every", 1],
        tmp_path / "hand",
    )
    words = list(map(str, [*size, "--out", out]))
    assert by_hand.main(words) == 0
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step .*  loss (\S+)", output, re.MULTILINE)]
    in_jax = ["--steps", STEPS, "--log-every", 1, "--optimizer", "adamw", "--dtype", "float32"]
    assert train.main(tiny(text, tmp_path / "jax", *in_jax)) == 0
    np.testing.assert_allclose(
        losses, [line["loss"] for line in metrics(tmp_path / "jax") if "loss" in line], rtol=1e-4
    )
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    assert f"stages.generate --model {out}" in output
    capsys.readouterr()
    prompt, completion = re.search(
        r"\n\n(.{8})(.*)\n\nvalidation", output, re.DOTALL
    ).groups()  # bytes are tokens
    assert evaluate.main(["--model", str(out), "--data", str(text)]) == 0
    capsys.readouterr()
    assert (
        generate.main(["--model", str(out), "--prompt", prompt, "--temperature", "0", "--max-tokens", "24"])
        == 0
    )
    assert capsys.readouterr().out.rstrip("\n") == completion[:24].rstrip("\n")
    assert f"{out} is there already" in failing(by_hand.main, words)


def test_what_cannot_be_is_a_sentence(text, tmp_path, monkeypatch, failing):
    words, out = ["--data", text, "--batch", 4, "--context", 32, "--out", tmp_path / "out"], tmp_path / "out"
    error = failing(by_hand.main, [*words, "--batch", 50_000_000])
    assert "kept by the forward pass for the backward pass" in error
    assert "smaller --batch" in error
    gradient = model.loss_and_gradient
    monkeypatch.setattr(model, "loss_and_gradient", lambda *args: (float("nan"), gradient(*args)[1]))
    assert "The loss or gradient of step 1 is not a number: lower --learning-rate" in failing(
        by_hand.main, words
    )
    assert not out.exists()

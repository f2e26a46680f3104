"""Learning from rewards from the command line: a stopped run goes on to the same bits, and is a model like any other."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import metrics

from engine.storage import checkpoint
from engine.storage.digest import digest
from engine.storage.model_loader import load_model
from stages.reinforce import __main__ as reinforce
from stages.reinforce.rounds import Rounds


def args(model: Path, folder: Path, *more: object) -> list[str]:
    """Two rounds of four short completions."""
    flags = ["--model", model, "--task", "length:3", "--out-dir", folder, "--rounds", 2, "--prompts", 1, "--group", 4]
    return list(map(str, [*flags, "--max-tokens", 4, "--lora", "rank=2,alpha=4,targets=q,v", *more]))


def test_a_stopped_run_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch, capsys):
    unbroken, parts = tmp_path / "whole", tmp_path / "parts"
    assert reinforce.main([*args(trained, unbroken), "--dry-run"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert not unbroken.exists()
    assert reinforce.main(args(trained, unbroken)) == 0
    printed = capsys.readouterr().out
    assert "round 2/2  reward" in printed
    assert f"python -m stages.chat --model {unbroken}" in printed
    assert [line["step"] for line in metrics(unbroken)] == [1, 2]
    run = Rounds.run

    def stopping(self: Rounds, *state: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return run(self, *state)

    with monkeypatch.context() as stop:
        stop.setattr(Rounds, "run", stopping)
        assert reinforce.main(args(trained, parts)) == 130
    assert "Stopped at round 1" in capsys.readouterr().out
    assert checkpoint.steps(parts) == [1]
    assert reinforce.main(args(trained, parts)) == 0
    models = [load_model(str(folder)) for folder in (unbroken, parts)]
    assert digest(models[0].params) == digest(models[1].params)
    assert reinforce.main(args(trained, parts)) == 0
    assert "This run is finished: 2 rounds" in capsys.readouterr().out
    assert reinforce.main(args(trained, parts, "--seed", 1)) == 2
    assert "another text" in capsys.readouterr().err  # the seed orders the prompts


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--task", "size:3"), "size"),
        (("--max-tokens", 64), "a lower --max-tokens or shorter prompts"),
        (("--data", "gone.jsonl"), "There is no file gone.jsonl"),
    ],
)
def test_bad_input(flags, sentence, trained, tmp_path, failing):
    assert sentence in failing(reinforce.main, args(trained, tmp_path / "bad", *flags))
    assert not (tmp_path / "bad").exists()

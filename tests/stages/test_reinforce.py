"""Learning from rewards from the command line: a stopped run goes on to the same bits, and is a model like any other."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from engine.model.transformer import forward
from engine.storage import checkpoint
from engine.storage.digest import digest
from engine.storage.model_loader import load_model
from stages.reinforce import __main__ as reinforce
from stages.reinforce import run as reinforce_run
from stages.reinforce.rollouts import Rollout, prompts_for, rollout_batch, score_batch
from stages.reinforce.run import ALIKE_ROUNDS, Rounds
from stages.runs import rewards
from tests.stages.tiny_runs import at_step, interrupt, metrics


def args(model: Path, folder: Path, *more: object) -> list[str]:
    """Two rounds of four short completions."""
    flags = [
        "--model",
        model,
        "--task",
        "length:3",
        "--out-dir",
        folder,
        "--rounds",
        2,
        "--prompts",
        1,
        "--group",
        4,
    ]
    return list(map(str, [*flags, "--max-tokens", 4, "--lora", "rank=2,alpha=4,targets=q,v", *more]))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())["result"]


def stop_after_a_round(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 1, interrupt)
        assert reinforce.main(flags) == 130


def test_the_run_of_the_model_is_not_overwritten(trained, tmp_path, failing):
    run = shutil.copytree(trained, tmp_path / "run")
    for model in (run, run / "checkpoints" / "20"):
        assert "is the run of the model itself" in failing(reinforce.main, args(model, run, "--overwrite"))
    assert (run / "checkpoints" / "20").is_dir()


@pytest.mark.whole
@pytest.mark.law("resume")
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
    stop_after_a_round(args(trained, parts), monkeypatch)
    assert "Stopped at round 1" in capsys.readouterr().out
    assert checkpoint.steps(parts) == [1]
    assert reinforce.main(args(trained, parts)) == 0
    models = [load_model(str(folder)) for folder in (unbroken, parts)]
    assert digest(models[0].params) == digest(models[1].params)
    measured = [result(folder) for folder in (unbroken, parts)]
    whole, both = (
        {name: each[name] for name in each if not re.search("seconds|rss|goodput", name)} for each in measured
    )
    assert whole == both  # what was before training too
    assert both["answer_tokens"] == sum(line["answer_tokens"] for line in metrics(parts))
    assert reinforce.main(args(trained, parts)) == 0
    assert "This run is finished: 2 rounds" in capsys.readouterr().out


@pytest.mark.whole
def test_a_refused_update_is_named_and_the_run_is_finished(trained, tmp_path, monkeypatch):
    step = Rounds.step

    def refused_first(self, state, loop_state):
        result = step(self, state, loop_state)
        return result._replace(refused=[loop_state.step == 0] * len(result.refused))

    monkeypatch.setattr(Rounds, "step", refused_first)
    assert reinforce.main(args(trained, tmp_path / "run")) == 0
    assert ["reward" in line for line in metrics(tmp_path / "run")] == [False, True, True]


@pytest.mark.parametrize(
    ("task", "reward", "advice"),
    [
        ("regex:^$^x", "0.00", "Give prompts that fit the task"),
        ("regex:^", "1.00", "The model does this already"),
    ],
)
def test_rounds_without_a_difference_stop_with_advice(task, reward, advice, trained, tmp_path, failing):
    folder = tmp_path / "alike"
    error = failing(reinforce.main, args(trained, folder, "--task", task, "--rounds", 100))
    assert (
        f"In {ALIKE_ROUNDS} rounds in a row all answers to a prompt had the same reward ({reward} on average)"
        in error
    )
    assert advice in error
    assert not folder.exists()
    assert "In 2 rounds in a row" in failing(reinforce.main, args(trained, folder, "--task", task))


def test_a_stopped_run_still_knows_that_nothing_differed(trained, tmp_path, monkeypatch, failing):
    """And counts on: the rounds in a row before the interruption are among those that end it."""
    folder = tmp_path / "alike"
    stop_after_a_round(args(trained, folder, "--task", "regex:^"), monkeypatch)
    assert "In 2 rounds in a row" in failing(reinforce.main, args(trained, folder, "--task", "regex:^"))
    assert not folder.exists()
    endless = args(trained, folder, "--task", "regex:^", "--rounds", 100)
    stop_after_a_round(endless, monkeypatch)
    with monkeypatch.context() as count:
        rounds, step = [], Rounds.step
        counting = lambda self, state, now: (
            rounds.append(len(now.stage_state["alike"])) or step(self, state, now)
        )
        count.setattr(Rounds, "step", counting)
        assert f"In {ALIKE_ROUNDS} rounds in a row" in failing(reinforce.main, endless)
    assert rounds == [*range(1, ALIKE_ROUNDS)]


@pytest.mark.parametrize("later", [1.0, 0.0])
def test_a_run_ends_early_when_nothing_is_left_to_learn(later, trained, tmp_path, monkeypatch, capsys):
    """With what was learned where the reward rose, with advice and no result where it did not."""
    folder, calls = tmp_path / "early", itertools.count()

    def make_reward(_: str) -> Any:
        # completions before training, and in the first round
        first, differing = reinforce_run.EVALUATED, 4

        def reward(text: str, right: int | None) -> float:
            call = next(calls)
            return 0.5 if call < first else call % 2 if call < first + differing else later

        return reward

    monkeypatch.setattr(rewards, "make_reward", make_reward)
    code = reinforce.main(args(trained, folder, "--rounds", 100))
    output = capsys.readouterr()
    assert len(metrics(folder)) == 1 + ALIKE_ROUNDS
    record = json.loads((folder / "run.json").read_text())
    assert bool(record.get("result")) == (later == 1.0)
    if later:
        assert code == 0
        assert f"early: {ALIKE_ROUNDS} rounds in a row" in output.out
    else:
        assert code == 2
        assert "the run has no result" in output.err


@pytest.mark.whole
def test_answers_are_scored_by_the_model_before_training(trained, tmp_path):
    """In bits per byte, the end of each included: before training their own model's, and KL is 0 in
    the first round.
    """
    folder = tmp_path / "scored"
    assert reinforce.main(args(trained, folder, "--learning-rate", 0.1, "--rounds", 3)) == 0
    first, *_, last = metrics(folder)
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert last["kl"] > 10 * abs(first["kl"]) + 1e-3
    model = load_model(str(trained))
    assert result(folder)["base_bits_per_byte_after"] > 0
    text = "the sea"
    prompt, completion = (model.tokenizer.encode(part).tolist() for part in ("User: ", text))
    completion.append(model.tokenizer.eos_id)
    rollout = Rollout(rollout_batch([prompt], [completion], 32), [text], [len(text)], [1.0], 0.0)
    assert rollout.tokens == len(completion)
    logprobs = score_batch(model.cfg, model.params, rollout.batch, 1)
    bits = rollout.bits_per_byte(logprobs).of_all
    tokens = np.array([*prompt, *completion])[None]
    table = jax.nn.log_softmax(
        forward(model.cfg, model.params, tokens[:, :-1], np.arange(tokens.shape[1] - 1)[None])[0]
    )
    nats = -sum(float(table[0, at - 1, tokens[0, at]]) for at in range(len(prompt), tokens.shape[1]))
    assert bits == pytest.approx(nats / np.log(2) / len(text), rel=1e-3)
    assert logprobs.sum() == pytest.approx(-nats, rel=1e-3)


def test_no_held_out_prompt_is_a_copy_of_a_training_prompt(tmp_path):
    rows = [
        {"prompt": text} for text in ("What is rain?", "what is  rain", "What is snow?", "WHAT IS RAIN?!")
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = prompts_for({"length"}, tmp_path / "prompts.jsonl", 0)
    assert sorted(prompt.text for prompt in (*prompts.train, *prompts.held_out)) == [
        "What is rain?",
        "What is snow?",
    ]
    assert "2 copies left out" in prompts.name
    sums = [
        {"prompt": f"What is {text}?"} for text in ("1 - 23", "12 - 3", "12 / 3", "123", "1.23", "-1 - 23")
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, sums)))
    prompts = prompts_for({"length"}, tmp_path / "prompts.jsonl", 0)
    assert len((*prompts.train, *prompts.held_out)) == len(sums)

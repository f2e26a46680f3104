"""What a restart must not change: weights, order of the data, rows of validation, the best; and what it must not ignore."""

import dataclasses
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tyro

from engine import manifest
from engine.device import Device
from engine.errors import UserError
from engine.files import write_json
from engine.model.config import LoraConfig
from engine.model.transformer import init_params
from engine.storage import checkpoint, checkpoint_reader
from engine.storage.digest import digest
from engine.storage.model_loader import peek_model
from engine.storage.run_folder import read_config, read_json
from engine.text.batch import ORDER_VERSION, TextBatches
from engine.text.chat_tokenizer import ChatTokenizer
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state
from stages.cli.console import Console
from stages.evaluate import __main__ as evaluate
from stages.finetune.flags import FinetuneFlags
from stages.finetune.run import plan_tuning, prepare_tuning
from stages.runs import loop, model_stage
from stages.runs.batch_steps import BatchSteps
from stages.runs.folder import JsonLines, updating
from stages.runs.options import RunOptions
from stages.runs.run import run_metadata
from stages.runs.settings import FIXED, describe_changes, differences, refusals, settings
from stages.runs.stage import LoopState
from stages.train import __main__ as train
from stages.train.flags import TrainFlags
from stages.train.run import PreparedTraining, plan_training, prepare_training
from tests.stages.tiny_runs import Killed, at_step, interrupt, kill, metrics, tiny


def state_digest(folder: Path) -> str:
    """Of weights and optimizer in a run's newest checkpoint, with its step."""
    cfg = read_config(folder)
    tx = make_optimizer(OptimizerConfig(**read_json(folder / "run.json")["recipe"]["optimizer"]))
    like = jax.eval_shape(lambda: init_state(tx, init_params(cfg, jax.random.key(0))))
    loaded = checkpoint_reader.load(folder, like.trainable, like.opt_state)
    assert not loaded.damaged
    return f"{loaded.step} {digest(loaded.params)} {digest(loaded.optimizer)}"


def loop_state(folder: Path) -> LoopState:
    newest = checkpoint.steps(folder)[-1]
    return LoopState.from_json(read_json(folder / "checkpoints" / str(newest) / "state.json")["state"])


def validation_rows(folder: Path) -> list[tuple[int, float]]:
    key = "quick_val_bits_per_byte"
    return [(line["step"], line[key]) for line in metrics(folder) if key in line]


@pytest.mark.whole
@pytest.mark.law("resume")
def test_a_run_that_is_killed_and_stopped_goes_on_to_the_same_bits(text, tmp_path, monkeypatch, capsys):
    """Of weights, optimizer, rows of validation and the best; the checkpoints are those of the
    uninterrupted run too.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = ["--steps", 10, "--eval-every", 3, "--save-every", 4, "--keep", 9]
    assert train.main(tiny(text, whole, *often)) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, kill)
        with pytest.raises(Killed):
            train.main(tiny(text, parts, *often))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, 6, interrupt)  # when it is about to evaluate
        assert train.main(tiny(text, parts, *often)) == 130
    output = capsys.readouterr().out
    # the kill came while step 4 was saved, or after
    assert re.search("resumed at step [34]", output)
    assert "Stopped at step 6" in output
    assert f"To go on: python -m stages.train tiny --data {text}" in output
    assert "result" not in read_json(parts / "run.json")
    assert train.main(tiny(text, parts, *often)) == 0
    assert "resumed at step 6" in capsys.readouterr().out
    assert [step for step, _ in validation_rows(whole)] == [3, 6, 9, 10]
    assert validation_rows(parts) == validation_rows(whole)
    assert (
        checkpoint.steps(whole) == checkpoint.steps(parts) == [3, 6, 9, 10]
    )  # the best of each time, and the last
    same = ("best", "best_step", "validation", "refused")
    assert [getattr(loop_state(parts), name) for name in same] == [
        getattr(loop_state(whole), name) for name in same
    ]
    assert loop_state(parts).best_step == min(validation_rows(whole), key=lambda row: row[1])[0]
    assert state_digest(parts) == state_digest(whole)
    results = [read_json(folder / "run.json")["result"]["val_bits_per_byte"] for folder in (whole, parts)]
    assert results[0] == results[1]


def test_the_state_of_a_loop_is_read_back_and_an_older_one_has_the_defaults():
    state = LoopState(10, 2.0, evaluation_seconds=0.4, intervals={"evaluate": (0, 0.0)})
    read = LoopState.from_json(json.loads(json.dumps(state.to_json())))
    assert read == state
    assert [read.is_due("evaluate", length) for length in (10, 11, 2.0, 2.1)] == [True, False, True, False]
    record = {
        "step": 3,
        "seconds": 1.5,
        "refused": 1,
        "best": 2.5,
        "first_step_seconds": 4.0,
        "seed": 0,
        "digests": {},
    }
    assert LoopState.from_json(record) == LoopState(3, 1.5, 1, best=2.5, first_step_seconds=4.0)
    with pytest.raises(KeyError):
        LoopState.from_json({"seconds": 1.5})


@pytest.mark.whole
def test_ctrl_c_while_the_last_checkpoint_is_written_leaves_the_last_measurement_to_the_next_start(
    text, tmp_path, monkeypatch
):
    write, flags = checkpoint.write, tiny(text, tmp_path / "run", "--steps", 3)

    def interrupted(folder: Path, step: int, *args: Any, **options: Any) -> Path:
        if step == 3:
            time.sleep(0.3)  # until the loop waits for nothing else
            interrupt()
        return write(folder, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", interrupted)
        assert train.main(flags) == 130
    assert "result" not in read_json(tmp_path / "run" / "run.json")
    assert train.main(flags) == 0


def poison(monkeypatch: pytest.MonkeyPatch, batches: range) -> None:
    """Steps on these batches of the data have an update that is not finite."""
    bad: set[bytes] = set()
    begin_steps = PreparedTraining.begin_steps

    def begin(self: PreparedTraining, *args: Any) -> BatchSteps:
        steps = begin_steps(self, *args)
        order = TextBatches(self.training.data.train.tokens, 32, 4, 0)
        bad.update(order.at(number).tokens.tobytes() for number in batches)
        program, is_bad = steps.program, lambda batch: batch.tokens.tobytes() in bad
        steps.program = lambda state, frozen, batch, progress: program(
            state, frozen, batch, math.nan if is_bad(batch) else progress
        )
        return steps

    monkeypatch.setattr(PreparedTraining, "begin_steps", begin)


@pytest.mark.whole
def test_the_best_is_saved_though_its_evaluation_falls_due_at_a_refused_step(text, tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 6))
    assert train.main(tiny(text, tmp_path / "run", "--steps", 8, "--eval-every", 3, "--save-every", 100)) == 0
    assert [step for step, _ in validation_rows(tmp_path / "run")] == [3, 7, 8]
    assert loop_state(tmp_path / "run").best_step in checkpoint.steps(tmp_path / "run")


def test_other_contents_of_the_same_file_are_said():
    there = dict.fromkeys(FIXED, "the same") | {"text/data": "chats.jsonl"}
    assert refusals(there, there | {"text/digest": "other"}) == [
        "text (what is read from chats.jsonl has changed)"
    ]


@pytest.mark.whole
@pytest.mark.parametrize("why", ["another text", "damage"])
def test_a_best_on_another_validation_text_or_a_damaged_one_is_forgotten(
    text, tmp_path, monkeypatch, capsys, why
):
    words = tiny(text, tmp_path / "run", "--eval-every", 2, "--steps", 13)
    (held_out := tmp_path / "held-out.txt").write_bytes(text.read_bytes()[:-99])
    with monkeypatch.context() as patch:
        at_step(patch, 9, interrupt)
        assert train.main([*words, "--validation", str(held_out)]) == 130
    best = loop_state(tmp_path / "run").best_step
    if why == "damage":
        (tmp_path / "run" / "checkpoints" / str(best) / "params.safetensors").write_bytes(b"")
    else:
        held_out.write_text("QXZ 0123456789 " * 99, encoding="utf-8")  # harder
    assert train.main([*words, "--validation", str(held_out)]) == 0
    rows = {step: value for step, value in validation_rows(tmp_path / "run") if step > 9}
    assert loop_state(tmp_path / "run").best == min(rows.values())
    printed = capsys.readouterr().out
    assert (f"forgotten: step {best} was the best" in printed) == (why == "damage")
    assert ("\nchanged: what is in the validation data\n" in printed) == (why != "damage")


@pytest.mark.parametrize("state", [{}, {"step": 7, "seconds": 1.0}, {"step": "20", "seconds": None}, None])
def test_a_state_that_is_not_that_of_its_step_is_refused(trained, text, tmp_path, failing, state):
    """Whoever makes a run folder makes its manifests right."""
    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "checkpoints" / "20" / "state.json"
    write_json(file, read_json(file) | {"state": state})
    (file.parent / manifest.NAME).unlink()
    manifest.write_manifest(file.parent)
    error = failing(train.main, tiny(text, run, "--steps", 30, "--tokenizer", "bpe:300", "--context", 64))
    assert f"{file} is damaged: it does not say the state of a run at step 20." in error


@pytest.mark.whole
def test_a_run_whose_batches_came_in_another_order_is_used_and_not_resumed(text, tmp_path, failing, capsys):
    folder = tmp_path / "run"
    words = tiny(text, folder, "--steps", 2)
    assert train.main(words) == 0
    record = read_json(folder / "run.json")
    assert record.pop("order") == ORDER_VERSION
    with updating(folder):
        write_json(folder / "run.json", record)
    for more in (["--steps", "3"], ["--seed", "1"]):
        assert "in the order of another version: it cannot be resumed" in failing(train.main, [*words, *more])
    assert checkpoint.steps(folder)[-1] == 2
    assert train.main(words) == 0
    assert "This run is finished: 2 steps" in capsys.readouterr().out
    assert evaluate.main(["--model", str(folder)]) == 0


@pytest.mark.whole
def test_the_stop_after_refusals_saves_and_says_which_batches_they_were(text, tmp_path, monkeypatch, failing):
    folder = tmp_path / "run"
    poison(monkeypatch, range(3, 13))
    words = tiny(text, folder, "--steps", 16, "--save-every", 5, "--eval-every", 100)
    error = failing(train.main, words)
    assert "batches 3 to 12 of the data" in error
    assert f"saved at step 3 in {folder}" in error
    assert [line["refused_batch"] for line in metrics(folder) if "refused_batch" in line] == [*range(3, 13)]
    assert "Lower --learning-rate" in error
    assert "10 steps in a row" in failing(
        train.main, words
    )  # the same command does not pass over data by itself


@pytest.mark.whole
def test_metrics_that_cannot_be_written_end_the_run_after_a_checkpoint(text, tmp_path, monkeypatch, failing):
    """What all processes do together, as saving, process 0 does too though it could not write its
    line.
    """
    folder = tmp_path / "run"
    evaluate_and_save, together = loop.evaluate_and_save, []

    def fill_the_disk() -> None:
        (folder / "metrics.jsonl").unlink()
        os.symlink("/dev/full", folder / "metrics.jsonl")

    words = tiny(text, folder, "--steps", 5, "--log-every", 1, "--save-every", 100, "--eval-every", 100)
    with monkeypatch.context() as patch:
        at_step(patch, 3, fill_the_disk)
        noted = lambda run, *args: together.append(run.loop_state.step) or evaluate_and_save(run, *args)
        patch.setattr(loop, "evaluate_and_save", noted)
        error = failing(train.main, words)
    assert together == [0, 1, 2, 3]
    assert f"{folder / 'metrics.jsonl'}: the disk is full" in error
    assert "The run was saved at step 3" in error
    assert checkpoint.steps(folder) == [3]
    (folder / "metrics.jsonl").unlink()
    assert train.main(words) == 0


def test_a_line_of_metrics_that_is_refused_once_is_whole(tmp_path, monkeypatch):
    log, append = JsonLines(tmp_path / "metrics.jsonl", 0), JsonLines.append
    log.add(step=1, loss=2.5)

    def half(self: JsonLines, fields: dict[str, Any]) -> None:
        monkeypatch.setattr(JsonLines, "append", append)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(JsonLines, "append", half)
    log.add(step=2, loss=2.25)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]


@pytest.mark.whole
def test_finished_run_says_so_and_goes_on_with_more_steps(trained, text, tmp_path, capsys):
    folder = tmp_path / "sea"
    shutil.copytree(trained, folder)
    same = tiny(text, folder, "--tokenizer", "bpe:300", "--context", 64)
    before, batch = (folder / "run.json").read_bytes(), same.index("--batch")
    # A batch that is not said is the run's: the preset's would be 8 here, and more on a mesh that 8
    # is no multiple of.
    assert train.main([*same[:batch], *same[batch + 2 :], "--steps", "20"]) == 0
    assert "This run is finished: 20 steps" in capsys.readouterr().out
    assert (folder / "run.json").read_bytes() == before
    assert train.main([*same, "--steps", "23"]) == 0
    assert "resumed at step 20" in capsys.readouterr().out
    assert read_json(folder / "run.json")["result"]["steps"] == 23
    assert train.main([*same, "--steps", "2", "--overwrite"]) == 0
    assert checkpoint.steps(folder) == [1, 2]
    assert {line["step"] for line in metrics(folder)} <= {1, 2}


@pytest.mark.whole
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(text, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main(tiny(text, folder, "--steps", 4, "--save-every", 2)) == 0
    assert checkpoint.steps(folder) == [2, 4]
    victim = folder / "checkpoints" / "4" / "params.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0\0")
    capsys.readouterr()
    # The run was finished, but what it finished with is not there any more: the same command makes
    # it again.
    assert train.main(tiny(text, folder, "--steps", 4, "--learning-rate", "0.001")) == 0
    output = capsys.readouterr().out
    assert f"damaged: {victim}" in output
    assert "resumed at step 2 (the newest intact one)" in output
    assert "changed: --learning-rate: 0.003 -> 0.001" in output
    assert (folder / "checkpoints" / "damaged-4").exists()
    assert manifest.verify(folder / "checkpoints" / "4") == []


# Other values for fields of which no arithmetic makes one; and what happens beside training, or
# what run.json's `device` shows.
OTHER = {
    "dtype": "float32",
    "tokenizer": "bpe:300",
    "optimizer": "adamw",
    "schedule": "cosine",
    "lora": LoraConfig(2),
    "train": ("head",),
    "freeze": ("bottom:1",),
    "base": "int8",
    "general": "none",
    "clip": 0.5,
    "objective": "preference",
    "batch": 6,
    "loss": "simpo",
    "metric": ("exact",),
    "weights": "q4",
}
BESIDE = {
    "preset",
    "model",
    "out_dir",
    "overwrite",
    "save_every",
    "keep",
    "log_every",
    "eval_every",
    "device",
    "dry_run",
    "verbose",
    "record",
    "watch",
    "tensorboard",
    "mesh",
    "processes",
    "process",
    "coordinator",
    "join_within",
    "accelerator",
    "patience",
    "keep_last",
}


def variants(flags: Any, other: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, flags) with each flag changed in turn."""
    kinds = typing.get_type_hints(type(flags))
    for name, value in vars(flags).items():
        replace = lambda new, name=name: dataclasses.replace(flags, **{name: new})
        kind = (*typing.get_args(kinds[name]), kinds[name])[0]
        if dataclasses.is_dataclass(value):
            yield from ((inner, replace(new)) for inner, new in variants(value, other))
        elif name in other and kind is not bool:
            yield name, replace(other[name])
        elif name not in BESIDE:
            yield (
                name,
                replace(
                    not value if kind is bool else (value or 0) + 2 if kind is int else (value or 0.5) * 0.5
                ),
            )


def is_noticed(before: Any, after: Any) -> bool:
    """Whether a change from (metadata, architecture) to another is refused, or recorded in
    run.json.
    """
    there, now = settings(*before), settings(*after)
    return bool(differences(there, now))


@pytest.mark.whole
@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_no_flag_changes_unnoticed(stage, text, trained, tmp_path, monkeypatch):
    chats, other, template = tmp_path / "chats.jsonl", tmp_path / "other.jsonl", tmp_path / "template.jinja"
    for path, answer in ((chats, "sails"), (other, "a far land")):
        rows = [
            {"prompt": f"the {word}", "completion": answer, "text": f"{answer} " * 20}
            for word in ("king", "queen", "sea")
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    values = OTHER | {
        "data": str(other),
        "validation": other if stage == "train" else str(other),
        "template": template,
    }
    if stage == "train":
        kind, words, make = TrainFlags, tiny(text, tmp_path, "--steps", 20), plan_training
        prepare: Any = prepare_training
    else:
        words = ["--model", trained, "--context", 40, "--steps", 20, "--general", text, "--data", chats]
        kind, make, prepare = FinetuneFlags, plan_tuning, prepare_tuning
        unread, chat = peek_model(str(trained)), functools.cache(ChatTokenizer)
        monkeypatch.setattr(model_stage, "peek_model", lambda *_, **__: unread)
        monkeypatch.setattr(model_stage, "ChatTokenizer", chat)
    flags = tyro.cli(
        kind, args=[*map(str, words)], config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    )

    def described(flags: Any) -> Any:
        options = RunOptions(
            stage=stage, device=Device("cpu", "a chip", 1, "here"), folder=tmp_path, dry_run=True
        )
        console = Console(io.StringIO())
        prepared = prepare(make(flags, options, console), console)
        return run_metadata(options, prepared.plan, prepared.metadata), prepared.plan.cfg

    before, unnoticed = described(flags), []
    assert not is_noticed(before, before)
    for name, changed in variants(flags, values):
        try:
            if not is_noticed(before, described(changed)):
                unnoticed.append(name)
        except UserError as error:
            unnoticed += [] if name == "objective" else [f"{name}: {error}"]  # no data fits both
    assert unnoticed == []


def test_a_run_resumed_on_the_other_path_of_attention_says_so():
    lines = describe_changes({"attention": ("in C", "by XLA")})
    assert lines == [
        "attention in C -> by XLA: the next steps are those in C within rounding, not to the bit"
    ]

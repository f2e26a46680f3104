"""What a restart must not change: rows of validation, the best, the batches that are skipped; and what it must not ignore."""

import copy
import dataclasses
import errno
import functools
import io
import json
import math
import os
import signal
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
from test_stage_train import interrupt_after
from tiny_runs import metrics, tiny

from engine.device import Device
from engine.errors import UserError
from engine.files import write_json
from engine.model.config import LoraConfig, RopeScaling
from engine.storage import checkpoint
from engine.storage.model_loader import load_model
from engine.storage.run_folder import read_config, read_json, updating
from engine.text import epoch_order
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.windows import TextBatches
from stages import evaluate
from stages.cli.console import Console
from stages.finetune.flags import FinetuneFlags
from stages.finetune.run import FineTuning
from stages.runs import loop, model_stage
from stages.runs.folder import MetricsLog
from stages.runs.loop import RunOptions
from stages.runs.loop_state import LoopState
from stages.runs.previous_run import differences, refusals, settings
from stages.runs.run import run_facts
from stages.train import __main__ as train
from stages.train.flags import TrainFlags
from stages.train.run import Training


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing is saved on the way out."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    count = loop.Loop._count

    def counting(self: loop.Loop, *args: Any) -> None:
        count(self, *args)
        if self.loop_state.step == step:
            raise Killed

    monkeypatch.setattr(loop.Loop, "_count", counting)


def loop_state(folder: Path) -> LoopState:
    newest = checkpoint.steps(folder)[-1]
    return LoopState.from_json(read_json(folder / "checkpoints" / str(newest) / "state.json")["state"])


def validation_rows(folder: Path) -> list[tuple[int, float]]:
    key = "quick_val_bits_per_byte"
    return [(line["step"], line[key]) for line in metrics(folder) if key in line]


def test_a_restart_changes_no_row_of_validation_and_no_best(text, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = ["--steps", 10, "--eval-every", 3, "--save-every", 4, "--keep", 9]
    assert train.main(tiny(text, whole, *often)) == 0
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            train.main(tiny(text, parts, *often))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6, signal.SIGTERM)  # when it is about to evaluate
        assert train.main(tiny(text, parts, *often)) == 143
    assert train.main(tiny(text, parts, *often)) == 0
    assert [step for step, _ in validation_rows(whole)] == [3, 6, 9, 10]
    assert validation_rows(parts) == validation_rows(whole)
    assert checkpoint.steps(whole) == checkpoint.steps(parts) == [3, 6, 9, 10]  # the best of each time, and the last
    same = ("best", "best_step", "validation", "refused")
    assert [getattr(loop_state(parts), name) for name in same] == [getattr(loop_state(whole), name) for name in same]
    assert loop_state(parts).best_step == min(validation_rows(whole), key=lambda row: row[1])[0]


def test_evaluations_stay_as_rare_as_they_were_found_to_cost():
    state = LoopState(10, 2.0, evaluation_seconds=0.4, intervals={"evaluate": (0, 0.0)})
    read = LoopState.from_json(json.loads(json.dumps(dataclasses.asdict(state))))
    assert read == state
    assert [read.is_due("evaluate", length) for length in (10, 11, 2.0, 2.1)] == [True, False, True, False]


def test_a_checkpoint_from_before_has_the_defaults():
    record = {"step": 3, "seconds": 1.5, "refused": 1, "best": 2.5, "first_step_seconds": 4.0, "seed": 0, "digests": {}}
    assert LoopState.from_json(record) == LoopState(3, 1.5, 1, best=2.5, first_step_seconds=4.0)
    with pytest.raises(KeyError):
        LoopState.from_json({"seconds": 1.5})


def test_ctrl_c_while_the_last_checkpoint_is_written_leaves_the_last_measurement_to_the_next_start(text, tmp_path, monkeypatch):
    write, flags = checkpoint.write, tiny(text, tmp_path / "run", "--steps", 3)

    def interrupted(folder: Path, step: int, *args: Any, **options: Any) -> Path:
        if step == 3:
            time.sleep(0.3)  # until the loop waits for nothing else
            os.kill(os.getpid(), signal.SIGINT)
        return write(folder, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", interrupted)
        assert train.main(flags) == 130
    assert "result" not in read_json(tmp_path / "run" / "run.json")
    assert train.main(flags) == 0


def poison(monkeypatch: pytest.MonkeyPatch, batches: range) -> None:
    """Steps on these batches of the data have an update that is not finite."""
    bad: set[bytes] = set()
    prepare_steps = Training.prepare_steps

    def prepare(self: Training, *args: Any) -> Any:
        order, steps = TextBatches(self.data.train.tokens, 32, 4, 0), prepare_steps(self, *args)
        bad.update(order.at(number).tokens.tobytes() for number in batches)
        program, is_bad = steps.program, lambda batch: batch.tokens.tobytes() in bad
        steps.program = lambda state, frozen, batch, progress: program(
            state, frozen, batch, math.nan if is_bad(batch) else progress
        )
        return steps

    monkeypatch.setattr(Training, "prepare_steps", prepare)


def test_the_best_is_saved_though_its_evaluation_falls_due_at_a_refused_step(text, tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 6))
    assert train.main(tiny(text, tmp_path / "run", "--steps", 8, "--eval-every", 3, "--save-every", 100)) == 0
    assert [step for step, _ in validation_rows(tmp_path / "run")] == [3, 7, 8]
    assert loop_state(tmp_path / "run").best_step in checkpoint.steps(tmp_path / "run")


def test_an_evaluation_that_a_stop_put_off_is_logged_once(text, tmp_path, monkeypatch):
    words = tiny(text, tmp_path / "run", "--steps", 8, "--eval-every", 3, "--save-every", 100)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGTERM)
        assert train.main(words) == 143
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            train.main(words)
    assert train.main(words) == 0
    assert [step for step, _ in validation_rows(tmp_path / "run")] == [3, 6, 8]


@pytest.mark.parametrize("why", ["another text", "damage"])
def test_a_best_on_another_validation_text_or_a_damaged_one_is_forgotten(text, tmp_path, monkeypatch, capsys, why):
    words = tiny(text, tmp_path / "run", "--eval-every", 2, "--steps", 13)
    (held_out := tmp_path / "held-out.txt").write_bytes(text.read_bytes()[:-99])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9, signal.SIGTERM)
        assert train.main([*words, "--validation", str(held_out)]) == 143
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


def test_the_only_checkpoint_is_found_though_a_kill_came_while_it_was_replaced(text, tmp_path, capsys):
    assert train.main(words := tiny(text, tmp_path / "run", "--steps", 2)) == 0
    root = tmp_path / "run" / "checkpoints"
    (root / ".2.x.unfinished").mkdir()
    (root / "2").rename(root / ".2.x.unfinished" / "old")
    assert train.main(words) == 0
    assert "This run is finished: 2 steps" in capsys.readouterr().out


def test_a_run_whose_batches_came_in_another_order_is_used_and_not_resumed(text, tmp_path, failing, capsys):
    folder = tmp_path / "run"
    words = tiny(text, folder, "--steps", 2)
    assert train.main(words) == 0
    record = read_json(folder / "run.json")
    assert record.pop("order") == epoch_order.VERSION
    with updating(folder):
        write_json(folder / "run.json", record)  # as earlier versions wrote it
    error = failing(train.main, [*words, "--steps", "3"])
    assert "in the order of another version: it cannot be resumed" in error
    assert checkpoint.steps(folder)[-1] == 2
    assert train.main(words) == 0
    assert "This run is finished: 2 steps" in capsys.readouterr().out
    assert load_model(str(folder), dtype=None).cfg == read_config(folder)


def test_the_stop_after_refusals_saves_and_says_which_batches_they_were(text, tmp_path, monkeypatch, failing):
    folder = tmp_path / "run"
    poison(monkeypatch, range(3, 13))
    words = tiny(text, folder, "--steps", 16, "--save-every", 5, "--eval-every", 100)
    error = failing(train.main, words)
    assert "batches 3 to 12 of the data" in error
    assert f"saved at step 3 in {folder}" in error
    assert [line["refused_batch"] for line in metrics(folder) if "refused_batch" in line] == [*range(3, 13)]
    assert "10 steps in a row" in failing(train.main, words)  # the same command does not pass over data by itself

    assert "Lower --learning-rate" in error


def test_a_run_that_left_batches_out_is_evaluated_and_not_resumed(text, tmp_path, failing, capsys):
    folder = tmp_path / "run"
    assert train.main(words := tiny(text, folder, "--steps", 3)) == 0
    record = read_json(folder / "run.json")
    for skipped in ("", "1..2"):  # as older versions wrote it
        with updating(folder):
            (folder / "run.json").write_text(json.dumps(record | {"skipped_batches": skipped}))
        assert not skipped or "left out batches 1..2 of its data with --skip-batches" in failing(train.main, words)
        assert skipped or train.main(words) == 0
    assert "changed" not in capsys.readouterr().out
    assert evaluate.main(["--model", str(folder)]) == 0


def test_metrics_that_cannot_be_written_end_the_run_after_a_checkpoint(text, tmp_path, monkeypatch, failing):
    """What all processes do together, as saving, process 0 does too though it could not write its line."""
    folder = tmp_path / "run"
    count, evaluate_and_save, together = loop.Loop._count, loop.Loop._evaluate_and_save, []

    def counting(self: loop.Loop, *args: Any) -> None:
        count(self, *args)
        if self.loop_state.step == 3:
            (folder / "metrics.jsonl").unlink()
            os.symlink("/dev/full", folder / "metrics.jsonl")

    words = tiny(text, folder, "--steps", 5, "--log-every", 1, "--save-every", 100, "--eval-every", 100)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_count", counting)
        noted = lambda self, *args: together.append(self.loop_state.step) or evaluate_and_save(self, *args)
        patch.setattr(loop.Loop, "_evaluate_and_save", noted)
        error = failing(train.main, words)
    assert together == [0, 1, 2, 3]
    assert f"{folder / 'metrics.jsonl'}: the disk is full" in error
    assert "The run was saved at step 3" in error
    assert checkpoint.steps(folder) == [3]
    (folder / "metrics.jsonl").unlink()
    assert train.main(words) == 0


def test_a_line_of_metrics_that_is_refused_once_is_whole(tmp_path, monkeypatch):
    log, append = MetricsLog(tmp_path, 0), MetricsLog._append
    log.add(step=1, loss=2.5)

    def half(self: MetricsLog, fields: dict[str, Any]) -> None:
        monkeypatch.setattr(MetricsLog, "_append", append)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "lo')
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(MetricsLog, "_append", half)
    log.add(step=2, loss=2.25)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]


# Other values for fields of which no arithmetic makes one; what happens beside training; and what is in another field too.
OTHER = {
    "dtype": "float32", "tokenizer": "bpe:300", "optimizer": "adamw", "schedule": "cosine", "kind": "adamw", "remat": "block",
    "lora": LoraConfig(2), "train": ("head",), "freeze": ("bottom:1",), "base": "int8", "general": "none", "clip": 0.5,
    "objective": "preference", "batch": 6, "rope_scaling": RopeScaling(2.0, 1.0, 4.0, 32),
}  # fmt: skip
FACTORS = {"embedding_factor", "head_factor"}  # which an older run.json does not have
BESIDE = {"out_dir", "overwrite", "save_every", "keep", "log_every", "eval_every", "device", "dry_run", "verbose"}
BESIDE |= {
    "by_hand",
    "mesh",
    "processes",
    "process",
    "coordinator",
    "join_within",
    "accelerator",
}  # run.json's `device` shows them
ELSEWHERE = {"preset", "model", "name", "noun", "trainable"}  # in the architecture, the base's digest, the stage, and `learns`


def variants(config: Any, other: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, config) with each field changed in turn, those of dataclasses within it too."""
    kinds = typing.get_type_hints(type(config))
    for name, value in vars(config).items():
        replace = lambda new, name=name: dataclasses.replace(config, **{name: new})
        if dataclasses.is_dataclass(value) and name not in ELSEWHERE:
            yield from ((inner, replace(new)) for inner, new in variants(value, other))
        elif name not in BESIDE | ELSEWHERE:
            kind = (*typing.get_args(kinds[name]), kinds[name])[0]
            if name in other and kind is not bool:
                yield name, replace(other[name])
            else:
                yield name, replace(not value if kind is bool else (value or 0) + 2 if kind is int else (value or 0.5) * 0.5)


def notices(before: Any, after: Any) -> bool:
    """Whether a change from (facts, architecture) to another is refused, or recorded in run.json."""
    there, now = settings(*before), settings(*after)
    return bool(refusals(there, now) or differences(there, now))


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_neither_a_flag_nor_a_field_of_the_plan_changes_unnoticed(stage, text, trained, tmp_path, monkeypatch):
    chats, other, template = tmp_path / "chats.jsonl", tmp_path / "other.jsonl", tmp_path / "template.jinja"
    for path, answer in ((chats, "sails"), (other, "a far land")):
        rows = [{"prompt": f"the {word}", "completion": answer, "text": f"{answer} " * 20} for word in ("king", "queen", "sea")]
        path.write_text("\n".join(map(json.dumps, rows)))
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    values = OTHER | {"data": str(other), "validation": other if stage == "train" else str(other), "template": template}
    if stage == "train":
        kind, words, make = TrainFlags, tiny(text, tmp_path, "--steps", 20), Training
    else:
        kind, words = FinetuneFlags, ["--model", trained, "--context", 40, "--steps", 20, "--general", text, "--data", chats]
        make = lambda flags, *more: FineTuning(flags, flags.length.max_time, *more)
        model, chat = load_model(str(trained), dtype=None), functools.cache(ChatTokenizer)
        monkeypatch.setattr(model_stage, "load_model", lambda *_, on_config, **__: on_config(model.cfg) or model)
        monkeypatch.setattr(model_stage, "ChatTokenizer", chat)
    flags = tyro.cli(kind, args=[*map(str, words)], config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))

    def described(flags: Any) -> Any:
        options = RunOptions(stage, Device("cpu", "a chip", 1, "here"), tmp_path, True, False, 60.0, 2)
        made = make(flags, options, Console(io.StringIO()))
        if stage == "finetune":
            made.load_weights()
        return options, made.plan, made.facts

    facts_of = lambda options, plan, facts: (run_facts(options, plan, facts), plan.cfg)
    options, plan, facts = described(flags)
    before = facts_of(options, plan, facts)
    assert not notices(before, before)
    rest = {name: value for name, value in facts.items() if name != "recipe"}  # which is the plan's too
    planned = facts_of(options, plan, rest)
    older = copy.deepcopy(planned[0])
    assert {older["recipe"]["optimizer"].pop(name) for name in FACTORS} == {1}
    unnoticed = [
        f"plan's {name}"
        for name, changed in variants(plan, OTHER | ({} if stage == "train" else {"kind": "muon", "schedule": "wsd"}))
        if not notices(planned, facts_of(options, changed, rest))
        or (name in FACTORS and not notices((older, plan.cfg), facts_of(options, changed, rest)))
    ]
    for name, changed in variants(flags, values):
        try:
            if not notices(before, facts_of(*described(changed))):
                unnoticed.append(name)
        except UserError as error:
            unnoticed += [] if name == "objective" else [f"{name}: {error}"]  # no data fits both
    assert unnoticed == []

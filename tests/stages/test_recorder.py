"""A recording of a run: what moves is what trains, and the run ends in the bits of one that is not recorded."""

import base64
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from engine.model.config import preset
from engine.storage import checkpoint, checkpoint_reader
from engine.storage.adapter_reader import is_adapter, read_leaves
from engine.storage.digest import digest
from engine.storage.run_folder import read_config, read_json
from stages.finetune import __main__ as finetune
from stages.reinforce import __main__ as reinforce
from stages.runs.watch import __main__ as watch
from stages.runs.watch.recorder import FIRST, PARTS, PIXELS, Recorder
from stages.train import __main__ as train
from tests.stages.tiny_runs import WORDS, Killed, at_step, command, kill, metrics, tiny

pytestmark = pytest.mark.whole

STEPS = 40
TUNING = {
    "lora": ("--lora", "rank=2,alpha=4,targets=q,v"),
    "over int8": ("--base", "int8"),
    "frozen": ("--freeze", "bottom:1"),
    "all": ("--train", "all"),
}


def events(file: Path, kind: str = "") -> list[dict[str, Any]]:
    """The events of a recording, of one kind if it is named; every line is JSON without NaN."""
    refuse = lambda constant: pytest.fail(constant)
    found = [
        json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return [event for event in found if event["event"] == (kind or event["event"])]


def saved_digest(folder: Path) -> str:
    saved, _ = checkpoint_reader.find_intact(folder)
    if is_adapter(saved):
        return digest(read_leaves(saved, read_config(folder)), scales=False)
    return digest(checkpoint_reader.load_params(folder, lambda *_: None).params)


def check_law(file: Path, folder: Path) -> None:
    """Each trainable tensor changes at every frame from the fourth step on, no frozen bit does, and
    the last is saved.
    """
    (begin,), frames, (end,) = (events(file, kind) for kind in ("begin", "frame", "end"))
    paths = {tensor["path"] for tensor in begin["tensors"] if tensor["trainable"]}
    counts = {True: 0, False: 0}
    for tensor in begin["tensors"]:
        counts[tensor["trainable"]] += math.prod(tensor["shape"])
    assert (begin["params"], begin["trainable"]) == (sum(counts.values()), counts[True])
    assert sum(tensor["rows"] * tensor["columns"] for tensor in begin["tensors"]) <= PIXELS
    assert (frames[0]["step"], frames[0]["changed"]) == (0, 0)
    assert "gradient_norms" not in frames[0]
    for frame in frames:
        assert frame["frozen_changed"] == 0
        assert frame["changed"] == sum(frame["changed_in"].values()) <= begin["trainable"]
        assert isinstance(frame["sample"], str)
        assert (
            frame["mosaic"].keys()
            == frame["limits"].keys()
            == {tensor["path"] for tensor in begin["tensors"]}
        )
        for tensor in begin["tensors"]:
            assert (
                len(base64.b64decode(frame["mosaic"][tensor["path"]])) == tensor["rows"] * tensor["columns"]
            )
        if frame["step"] >= FIRST:
            assert frame["changed_in"].keys() == frame["gradient_norms"].keys() == paths
            assert all(frame["changed_in"].values()), frame["changed_in"]
    assert len({frame["digest"] for frame in frames[FIRST:]}) == len(frames[FIRST:]) > 0
    assert frames[-1]["step"] == end["step"]
    assert frames[-1]["digest"] == end["digest"] == saved_digest(folder)
    assert end["result"] == read_json(folder / "run.json")["result"]


@pytest.mark.journeys
def test_a_recorded_training_run(text, tmp_path):
    """Through the real command; a run without --record ends in the same bits."""
    words = ("--steps", STEPS, "--log-every", 1, "--eval-every", 20)
    file, folder, plain = tmp_path / "new" / "run.jsonl", tmp_path / "recorded", tmp_path / "plain"
    done = command("train", *tiny(text, folder, *words, "--record", file))
    assert done.returncode == 0, done.stderr
    assert train.main(tiny(text, plain, *words)) == 0
    check_law(file, folder)
    for name in ("params.safetensors", "optimizer.safetensors"):
        assert (folder / "checkpoints" / str(STEPS) / name).read_bytes() == (
            plain / "checkpoints" / str(STEPS) / name
        ).read_bytes()
    (begin,), frames, steps = (events(file, kind) for kind in ("begin", "frame", "step"))
    order = [tensor["path"] for tensor in begin["tensors"]]
    assert order[:4] == ["embed", "blocks/0/attn_norm", "blocks/0/q", "blocks/0/k"]
    assert order.index("blocks/1/down") < order.index("norm")
    assert (begin["stage"], begin["name"], begin["steps"], begin["prompt"]) == ("train", "tiny", STEPS, "\n")
    wanted = {0, *range(1, FIRST + 1), *(math.ceil(part * STEPS / PARTS) for part in range(1, PARTS + 1))}
    assert [frame["step"] for frame in frames] == sorted(wanted)
    lines = [{"event": "step", **line} for line in metrics(folder) if "loss" in line]
    assert [{**step, "seconds": 0, "tokens_per_second": 0} for step in steps] == [
        {**line, "seconds": 0, "tokens_per_second": 0} for line in lines
    ]
    assert [event["step"] for event in events(file, "validation")] == [20, 40]
    assert [event["event"] for event in events(file)][-2:] == [
        "measure",
        "end",
    ]  # what is measured may take minutes
    assert events(file, "measure")[0]["step"] == STEPS
    norms = {step["step"]: step["grad_norm"] for step in steps}
    for frame in frames[1:]:  # the gradients are those of the step's own batch
        assert math.hypot(*frame["gradient_norms"].values()) == pytest.approx(norms[frame["step"]], rel=1e-3)


def test_the_last_frame_of_a_run_by_the_clock_is_a_part_behind_the_one_before(text, tmp_path, monkeypatch):
    """Though steps may turn out to be faster than the one that was to be the last."""
    ticks = itertools.count()
    monkeypatch.setattr("stages.runs.loop.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100))
    monkeypatch.setattr("stages.runs.progress.StepTimer.mean", lambda _: 0.05)
    file = tmp_path / "run.jsonl"
    assert train.main(tiny(text, tmp_path / "run", "--max-time", "1s", "--record", file)) == 0
    *_, before, last = events(file, "frame")
    assert last["step"] - before["step"] > 8
    assert last["gradient_norms"].keys() == last["changed_in"].keys()


def tune(model: Path, where: Path, folder: Path, *more: str) -> Path:
    """Fine-tunes in a few recorded steps, and returns the recording."""
    chats, file = where / "chats.jsonl", folder.with_suffix(".jsonl")
    chats.write_text(
        "\n".join(json.dumps({"prompt": f"the {word}", "completion": "red sails."}) for word in WORDS.split())
    )
    flags = (
        "--model",
        model,
        "--data",
        chats,
        "--out-dir",
        folder,
        "--context",
        32,
        "--general",
        "none",
        "--steps",
        8,
    )
    assert finetune.main([*map(str, flags), *more, "--record", str(file)]) == 0
    return file


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.night] * (name != "lora")) for name in TUNING]
)
def test_a_recorded_fine_tuning(name, trained, tmp_path):
    folder = tmp_path / "tuned"
    file = tune(trained, tmp_path, folder, *TUNING[name])
    check_law(file, folder)
    (begin,) = events(file, "begin")
    pair = [
        tensor["path"] for tensor in begin["tensors"] if re.fullmatch(r"blocks/0/q(/.*)?", tensor["path"])
    ]
    quantized, adapter = ["blocks/0/q/scale", "blocks/0/q/values"], ["blocks/0/q/a", "blocks/0/q/b"]
    parts = {"lora": ["blocks/0/q", *adapter], "over int8": [*quantized, *adapter]}
    assert pair == parts.get(name, ["blocks/0/q"])
    assert (begin["trainable"] < begin["params"]) == (name != "all")
    if name == "lora":  # an adapter on an adapter: the first is frozen
        check_law(tune(folder, tmp_path, tmp_path / "again", *TUNING[name]), tmp_path / "again")


def test_a_recorded_round_of_reinforcement(trained, tmp_path):
    file, folder = tmp_path / "run.jsonl", tmp_path / "run"
    flags = (
        "--model",
        trained,
        "--task",
        "length:3",
        "--out-dir",
        folder,
        "--rounds",
        5,
        "--prompts",
        1,
        "--group",
        4,
    )
    assert reinforce.main([*map(str, flags), "--max-tokens", "4", "--record", str(file)]) == 0
    frames = events(file, "frame")
    assert [frame["step"] for frame in frames] == [0, 1, 2, 3, 4, 5]
    assert frames[-1]["digest"] == saved_digest(folder)
    trained_rounds = {line["step"] for line in metrics(folder) if line["differs"]}
    assert trained_rounds == {frame["step"] for frame in frames if "gradient_norms" in frame}
    assert trained_rounds == {frame["step"] for frame in frames if frame["changed"]}


def test_a_killed_run_leaves_lines_and_goes_on_in_the_file_and_no_other_does(
    text, tmp_path, monkeypatch, failing
):
    file, folder = tmp_path / "run.jsonl", tmp_path / "run"
    file.write_text('{"event": "end", "step": 0}\n')  # of another run
    words = tiny(text, folder, "--steps", 12, "--log-every", 1, "--save-every", 5, "--record", file)
    with monkeypatch.context() as patch:
        at_step(patch, 8, kill)
        with pytest.raises(Killed):
            train.main(words)
    assert [event["step"] for event in events(file, "frame")] == [*range(8)]
    assert not events(file, "end")
    saved = checkpoint.steps(folder)[-1]
    with file.open("a") as lines:
        lines.write('{"event": "fra')
    assert train.main(words) == 0
    assert [event["step"] for event in events(file, "begin")] == [0, saved]
    assert [event["step"] for event in events(file, "step")] == [*range(1, 13)]
    assert events(file, "frame")[-1]["digest"] == events(file)[-1]["digest"] == saved_digest(folder)
    page = tmp_path / "page.html"
    assert watch.main([str(file), str(page)]) == 0
    assert events(file)[-1]["digest"] in page.read_text(encoding="utf-8")
    recorded, other = file.read_bytes(), tmp_path / "other"
    assert train.main(tiny(text, other, "--steps", 2)) == 0
    files = sorted(other.rglob("*"))
    error = failing(train.main, tiny(text, other, "--steps", 4, "--record", file))
    assert f"{file} holds the recording of another run (folder {folder}, and here {other})" in error
    assert file.read_bytes() == recorded
    assert sorted(other.rglob("*")) == files


def test_what_is_no_recording_is_not_replaced(text, tmp_path, failing):
    (link := tmp_path / "link").symlink_to(tmp_path / "nothing")
    trained_on = text.read_bytes()
    for path in (text, link):
        error = failing(train.main, tiny(text, tmp_path / "run", "--steps", 3, "--record", path))
        assert f"{path} is no recording, and is not replaced. Give another file with --record." in error
        assert not (tmp_path / "run").exists()
    assert text.read_bytes() == trained_on
    assert link.is_symlink()


def test_what_goes_wrong_is_said_once_and_the_run_goes_on(text, tmp_path, monkeypatch, capsys):
    (file := tmp_path / "file").touch()
    wrong = {tmp_path: "a file is needed", file / "run.jsonl": "File exists"}
    for number, (path, sentence) in enumerate(wrong.items()):
        assert train.main(tiny(text, tmp_path / str(number), "--steps", 3, "--record", path)) == 0
        output = capsys.readouterr().out
        assert output.count("The recording ended, and the run goes on: ") == 1
        assert sentence in output
    assert train.main(tiny(text, tmp_path / "0", "--steps", 3, "--record", tmp_path / "late.jsonl")) == 0
    assert "Nothing was recorded" in capsys.readouterr().out
    assert not (tmp_path / "late.jsonl").exists()
    monkeypatch.setattr("stages.runs.watch.recorder._pixels", lambda *_: 1 / 0)
    assert (
        train.main(tiny(text, tmp_path / "broken", "--steps", 3, "--record", tmp_path / "broken.jsonl")) == 0
    )
    assert capsys.readouterr().out.count("The recording ended, and the run goes on: ZeroDivisionError") == 1


def test_several_devices_and_files_of_the_run_itself_are_refused(text, tmp_path, failing):
    for name in ("metrics.jsonl", "samples/1.txt"):
        error = failing(
            train.main, tiny(text, tmp_path / "run", "--steps", 2, "--record", tmp_path / "run" / name)
        )
        assert "for what the run itself writes" in error
        assert not (tmp_path / "run").exists()
    error = failing(
        train.main,
        tiny(text, tmp_path / "run", "--mesh", "fsdp=2", "--dry-run", "--record", tmp_path / "file"),
    )
    assert "one device" in error


def test_bits_are_compared_and_a_sink_that_fails_leaves_the_others():
    """Of a frozen weight too: -0.0 is not 0.0."""
    seen, said = [], []
    watched = False
    recorder = Recorder([lambda _: 1 / 0, seen.append], said.append, True, lambda: watched)
    trainable, frozen = {"head": jnp.zeros((2, 3))}, {"embed": jnp.zeros((3, 2), jnp.bfloat16)}
    recorder.sample, recorder.digest_of = lambda _: "text", digest
    plan = SimpleNamespace(cfg=preset("demo"), name="", steps=3, seconds=None)
    recorder.begin(
        SimpleNamespace(plan=plan, frozen=frozen, prompt=lambda: ("", [])), trainable, 0, stage="finetune"
    )
    assert [tensor["path"] for tensor in seen[0]["tensors"]] == ["embed", "head"]
    recorder.frame(trainable, 0, 0.0)
    recorder.model = recorder.model._replace(frozen={"embed": frozen["embed"].at[1, 1].set(-0.0)})
    recorder.frame({"head": trainable["head"].at[0, :2].set(np.float32([math.nan, -0.0]))}, 1, 0.5)
    assert (seen[2]["changed"], seen[2]["frozen_changed"], seen[2]["changed_in"]) == (2, 1, {"head": 2})
    assert seen[2]["digest"] != digest(trainable)
    recorder.frame(trainable, 2, 0.5)
    recorder.frame(trainable, 3, 0.5)
    assert [event["changed"] for event in seen[3:]] == [2, 0]
    assert len(said) == 1
    assert "ZeroDivisionError" in said[0]
    assert not recorder.before_step(trainable, FIRST + 1, 0.01)
    watched, recorder.rests_until = True, 0.0
    assert recorder.before_step(trainable, FIRST + 1, 0.01), "who watches sees more than the record's parts"

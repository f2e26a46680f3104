"""Bad input on the command line: each is answered by a sentence and exit code 2, and nothing is lost."""

import errno
import re
import shutil

import jax
import pytest

from engine import manifest
from engine.counting import hardware
from engine.storage import checkpoint
from stages import export, generate
from stages.chat import ChatFlags
from stages.cli.command import explain_error, run_command
from stages.evaluate import __main__ as evaluate
from stages.evaluate.__main__ import EvaluateFlags
from stages.export import ExportFlags
from stages.finetune.flags import FinetuneFlags
from stages.generate import GenerateFlags
from stages.reinforce.flags import ReinforceFlags
from stages.serve.flags import ServeFlags
from stages.train import __main__ as train
from stages.train.flags import TrainFlags
from tests.stages.tiny_runs import command, tiny, write_text


def test_a_plan_reads_no_batch(text, tmp_path):
    assert train.main(tiny(text, tmp_path / "run", "--batch", 100_000_000, "--dry-run")) == 0


def test_a_folder_without_its_pictures_and_any_file_of_text_are_read(text, tmp_path, capsys):
    (folder := tmp_path / "folder").mkdir()
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe1")
    shutil.copy(text, folder / "code.py")
    for path, note in (
        (folder, f"Skipped 1 of 2 files in {folder}: not UTF-8 text (1 .jpg).\n"),
        (folder / "code.py", ""),
    ):
        assert train.main(tiny(path, tmp_path / "run", "--dry-run")) == 0
        output = capsys.readouterr().out
        assert output.startswith(note)
        assert ("Skipped" in output) == bool(note)


def test_run_of_another_kind_is_left_alone(trained, text, tmp_path, failing):
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    other = write_text(tmp_path / "other.txt", lines=200)
    same = ["--tokenizer", "bpe:300", "--context", 64]
    for args, words in (
        ([*tiny(text, trained, *same)[1:], "nano"], "width (32 there, 384 now)"),
        (tiny(text, trained, *same, "--seed", 3), "seed (0 there, 3 now)"),
        (tiny(text, trained, *same, "--batch", 2), "batch (4 there, 2 now)"),
        (tiny(text, trained, *same, "--optimizer", "adamw"), "optimizer (muon there, adamw now)"),
        (tiny(other, trained, "--tokenizer", trained / "tokenizer", "--context", 64), "text ("),
    ):
        error = failing(train.main, args)
        assert words in error
        assert "--out-dir" in error
        assert "--overwrite" in error
    assert before == {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}


@pytest.mark.whole
def test_no_sound_checkpoint(trained, text, tmp_path, failing):
    folder = tmp_path / "sea"
    shutil.copytree(trained, folder)
    for step in checkpoint.steps(folder):
        (state := folder / "checkpoints" / str(step) / "state.json").write_text("{}")
    state.unlink()
    state.mkdir()
    for main, args in (
        (train.main, tiny(text, folder, "--tokenizer", "bpe:300", "--context", 64, "--steps", 30)),
        (generate.main, ["--model", folder]),
        (evaluate.main, ["--model", folder]),
    ):
        error = failing(main, args)
        assert f"{state} is missing" in error, error
    (folder / "manifest.json").unlink()
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"tied"', '"tmed"'))
    assert "config.json does not describe a model. ModelConfig has no field 'tmed'" in failing(
        generate.main, ["--model", folder]
    )
    (folder / "config.json").write_text(config)
    (folder / "run.json").write_text("{")
    args = tiny(text, folder, "--tokenizer", "bpe:300", "--context", 64, "--steps", 1)
    assert "run.json is damaged" in failing(train.main, args)
    assert train.main([*args, "--overwrite"]) == 0


def test_no_network_offers_the_text_that_needs_none(tmp_path):
    nowhere = {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "THRICE_CACHE": str(tmp_path / "cache")}
    result = command("train", "--out-dir", tmp_path / "run", env=nowhere)
    assert result.returncode == 2, result.stderr
    assert b"The text `python` needs none" in result.stderr
    assert b"Traceback" not in result.stderr


def test_a_cache_that_cannot_be_written_stops_no_command(trained, tmp_path):
    nowhere = {"THRICE_CACHE": "", "JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": "/proc/nowhere"}
    result = command("export", "--model", trained, "--out", tmp_path / "out", env=nowhere)
    assert result.returncode == 0, result.stderr
    sentence = result.stderr.decode()
    assert sentence.startswith("warning: The cache folder /proc/nowhere/thrice cannot be written")
    assert sentence.endswith("set THRICE_CACHE or XDG_CACHE_HOME to a folder that you alone can write.\n")
    assert len(sentence.splitlines()) == 1


@pytest.mark.whole
def test_full_disk_keeps_what_was_saved(text, tmp_path, monkeypatch, failing):
    folder = tmp_path / "run"
    assert train.main(tiny(text, folder, "--steps", 2)) == 0
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as disk:
        disk.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        error = failing(train.main, tiny(text, folder, "--steps", 30, "--save-every", 3))
    assert "could not be written" in error
    assert manifest.verify(folder / "checkpoints" / "2") == []


def test_device_that_is_not_there(text, tmp_path, failing):
    absent = "TPU" if jax.default_backend() != "tpu" else "GPU"
    error = failing(train.main, tiny(text, tmp_path / "run", "--device", absent.lower()))
    assert f"There is no {absent}" in error
    result = command("train", *tiny(text, tmp_path / "run"), env={"JAX_PLATFORMS": "abacus"})
    assert result.returncode == 2
    assert b"JAX_PLATFORMS=abacus" in result.stderr
    assert b"Traceback" not in result.stderr


def test_sentences_for_what_the_system_refuses(tmp_path):
    full = explain_error(OSError(errno.ENOSPC, "full", str(tmp_path / "metrics.jsonl")))
    assert re.search(r"metrics\.jsonl: the disk is full \([\d,.]+ MB are free there\)", full or "")
    assert "may not" in (explain_error(PermissionError(errno.EACCES, "no", "/a/b")) or "")
    assert explain_error(KeyError("a mistake of ours")) is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (TrainFlags, "--batch --context --accumulate --remat"),
        (EvaluateFlags, "--batch --context"),
        (ExportFlags, ""),
        (ServeFlags, "--slots --capacity --keys-values"),
        (GenerateFlags, "--count --max-tokens"),
        (ReinforceFlags, "--prompts --group --max-tokens"),
        (FinetuneFlags, "--batch --context --accumulate --remat"),
        (ChatFlags, "--max-tokens"),
    ],
)
def test_too_little_memory_names_flags_that_the_command_has(flags, named, capsys):
    def fail(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    needed = ["--out", "x"] if flags is ExportFlags else []
    assert run_command("any", None, flags, fail, needed) == 2
    assert re.findall(r"--[\w-]+", capsys.readouterr().err) == named.split()
    assert run_command("any", None, flags, fail, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert set(named.split()) <= set(re.findall(r"--[\w-]+", shown))
    assert not re.search(r"None|STR|\(default: (on|True|False|'')\)", shown)


def test_weights_that_would_not_fit(trained, tmp_path, monkeypatch, failing):
    assert export.main(["--model", str(trained), "--out", str(tmp_path / "folder")]) == 0
    monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: 50_000)
    for model in (trained, tmp_path / "folder"):
        error = failing(generate.main, ["--model", model])
        assert re.search(
            r"The weights of .* take 1?\d\d(\.\d)? kB in \w+, and 50(\.0)? kB are available", error
        ), error


def test_verbose_shows_where_it_happened(tmp_path, capsys):
    assert generate.main(["--model", str(tmp_path / "nowhere"), "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err

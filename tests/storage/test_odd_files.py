"""Each file of a model or of data may be anything: nested deeply, huge, no text, a pipe, a device, a folder. All are refused
with a sentence, at once, and nothing is waited for. Files damaged at random are refused or read, never anything else.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import manifest
from engine.errors import UserError
from engine.files import write_json
from engine.storage import run_folder
from engine.storage.model_loader import load_model
from engine.text.conversations import read_conversations
from engine.text.corpus import read_corpus
from engine.text.template import read_template
from engine.text.tokenizer import byte_tokenizer, save_tokenizer
from stages.cli.command import explain_error
from stages.runs.folder import JsonLines, updating
from tests.storage.gguf_files import tiny_gguf
from tests.storage.hf_folders import CONFIG, WEIGHTS, write_folder
from tests.storage.tiny_checkpoints import save
from tests.tiny import lively_params, tiny_config


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**42)


def contents(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


SHAPES = {"pipe": pipe, "device": device, "folder": Path.mkdir, "huge": huge}
DATA = {
    "deep array": contents(b"[" * 200_000),
    "deep object": contents(b'{"a":' * 200_000),
    "no UTF-8": contents(b'{"a": "\xff"}'),
    "empty object": contents(b"{}"),
    "empty": contents(b""),
    "null": contents(b"null"),
    "number": contents(b"7"),
}
HF = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
RUN = (
    "run.json",
    "config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/generation_config.json",
    "checkpoints/1/manifest.json",
    "checkpoints/1/state.json",
    "checkpoints/1/params.safetensors",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Hugging Face folder, a run folder and a GGUF file, all small."""
    place = tmp_path_factory.mktemp("models")
    write_folder(place / "hf", CONFIG, WEIGHTS)
    write_json(place / "hf" / "generation_config.json", {})
    tokenizer = byte_tokenizer()
    cfg = tiny_config(vocab=tokenizer.vocab)
    write_json(place / "run" / "run.json", {"result": {}})
    write_json(place / "run" / "config.json", cfg.to_json())
    save_tokenizer(place / "run" / "tokenizer", tokenizer, (tokenizer.eos_id,), {})
    save(place / "run", 1, lively_params(cfg), {}, {})
    tiny_gguf(place / "model.gguf", kind="Q8_0")
    for name in ("hf", "run", "model.gguf"):
        load_model(str(place / name))
    return place


def is_refused(read: Callable[[], object], what: str) -> None:
    """Checks that reading ends with a sentence, or with what the file may leave out. Waiting ends
    with the test's time.
    """
    try:
        read()
    except BaseException as error:
        sentence = explain_error(error)
        if not sentence or len(sentence) > 600:
            raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize(
    ("model", "name"), [*(("hf", name) for name in HF), *(("run", name) for name in RUN), ("model.gguf", "")]
)
def test_a_file_of_a_model(models, tmp_path, model, name):
    for kind, make in (SHAPES | DATA).items():
        copy = tmp_path / kind / model
        copy.parent.mkdir()
        (shutil.copytree if name else shutil.copy)(models / model, copy)
        replaced(copy / name, make)
        if kind in DATA and name.startswith("checkpoints/") and "manifest" not in name:
            # as someone writes it who means harm
            manifest.write_manifest(copy / "checkpoints" / "1")
        is_refused(lambda copy=copy: load_model(str(copy)), f"{name} is {kind}")


@pytest.mark.parametrize("record", [{}, {"base": 7}, {"base": {"model": None}}])
def test_a_run_that_does_not_say_what_it_adapts(models, tmp_path, record):
    run = shutil.copytree(models / "run", tmp_path / "run")
    write_json(run / "run.json", {"kind": "adapter"} | record)
    with pytest.raises(UserError, match=r"run\.json does not say which model it adapts"):
        load_model(str(run))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jinja"])
def test_a_file_of_data(tmp_path, name):
    for kind, make in (SHAPES | DATA).items():
        if kind == "huge":
            continue  # data may be as large as memory
        make(path := tmp_path / f"{kind} {name}")
        readers = [lambda path=path: [*read_conversations(path)], lambda path=path: [*read_corpus(path)]]
        for read in readers if name != "a.jinja" else [lambda path=path: read_template(path)]:
            is_refused(read, f"{name} is {kind}")


def test_the_log_of_a_run(tmp_path):
    for kind, make in (SHAPES | DATA).items():
        if kind == "huge":
            continue
        folder = tmp_path / kind
        folder.mkdir()
        make(folder / "metrics.jsonl")
        is_refused(lambda folder=folder: JsonLines(folder / "metrics.jsonl", 1), kind)


@pytest.mark.parametrize("written", ["read", "missing"])
def test_a_run_that_ends_while_it_is_loaded_is_not_damaged(tmp_path, monkeypatch, written):
    """Its last result is written after the manifest was read, or the manifest is not written again
    yet.
    """
    with updating(tmp_path):
        write_json(tmp_path / "config.json", {})
        write_json(tmp_path / "run.json", {})
    describe, ends = manifest.describe, [True]

    def describe_late(path):
        if ends and path.name == "run.json":
            ends.clear()
            (tmp_path / manifest.NAME).unlink()
            write_json(tmp_path / "run.json", {"result": 1})
            if written == "read":
                with updating(tmp_path):
                    pass
        return describe(path)

    monkeypatch.setattr(manifest, "describe", describe_late)
    assert bool(run_folder.verify(tmp_path)) == (written == "missing")


@pytest.mark.law("hostile files")
def test_no_damage_escapes():
    """Loaded under a limit on memory; `python tests/storage/hostile.py SEED COUNT` tries as many as
    wanted.
    """
    script = Path(__file__).with_name("hostile.py")
    result = subprocess.run([sys.executable, script, "0", "200"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads(result.stdout)["outcomes"]
    assert sum(outcomes.values()) == 200
    assert all(
        outcomes[f"{word} {kind}"] > 0 for word in ("read", "refused") for kind in (".gguf", ".safetensors")
    )

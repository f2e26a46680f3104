"""A small text, and a model trained on it once."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stages import chat
from stages.train import __main__ as train
from tests.stages.tiny_runs import tiny, write_text
from tests.tiny import SMALL_MATRICES


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "sea.txt")


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """The run folder of a finished run. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "sea"
    assert train.main(tiny(text, folder, "--steps", 20, "--tokenizer", "bpe:300", "--context", 64)) == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def cheap_runs():
    """A machine is measured on small matrices. Fine-tuning drops compiled programs, for they take
    memory; here they stay.
    """
    from engine.counting import (
        hardware,
    )  # JAX comes with it, and tests/conftest.py first says where compiled programs go

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "MEASURE_PROGRAM", SMALL_MATRICES + hardware.MEASURE_PROGRAM)
        patch.setattr("stages.finetune.run._clear_programs", lambda: None)
        yield


@pytest.fixture
def failing(capsys):
    """Calls a command that must refuse: exit code 2, a sentence, no traceback. Returns stderr."""

    def call(main: Callable[[Sequence[str]], int], args: Sequence[str]) -> str:
        code = main(list(map(str, args)))
        output = capsys.readouterr()
        assert code == 2, output.out + output.err
        assert "Traceback" not in output.err
        return output.err

    return call


@pytest.fixture
def talk(monkeypatch, capsys):
    """Chats by lines from a pipe, greedily. Returns the exit code, and what came to stdout and
    stderr.
    """

    def call(lines: bytes, model: Path, *flags: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        code = chat.main(["--model", str(model), "--temperature", "0", *map(str, flags)])
        return code, *capsys.readouterr()

    return call

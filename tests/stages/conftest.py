"""A small text, and a model trained on it once."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stages import train

WORDS = "the king and queen of a far land went down to sea where ships with red sails lay at anchor all day".split()

Trainer = Callable[..., int]


def write_text(path: Path, lines: int = 300) -> Path:
    """Sentences of few words: a text that a tiny model learns something about in a few steps."""
    draw = random.Random(0)
    text = "\n".join(" ".join(draw.choice(WORDS) for _ in range(8)).capitalize() + "." for _ in range(lines))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def tiny(text: Path, folder: Path, *more: object) -> list[str]:
    """The arguments of a tiny run."""
    return list(map(str, ["tiny", "--data", text, "--out-dir", folder, "--batch", 4, "--context", 32, *more]))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "sea.txt")


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "sea"
    assert train.main(tiny(text, folder, "--steps", 20, "--tokenizer", "bpe:300", "--context", 64)) == 0
    return folder


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[Sequence[str]], int], Sequence[str]], str]:
    """Calls a command that must refuse: exit code 2, a sentence, no traceback. Returns what it said."""

    def call(main: Callable[[Sequence[str]], int], args: Sequence[str]) -> str:
        code = main(list(map(str, args)))
        said = capsys.readouterr()
        assert code == 2, said.out + said.err
        assert "Traceback" not in said.err
        return said.err

    return call

"""A small text, and a model trained on it once."""

from collections.abc import Callable, Sequence

import pytest
from tiny_runs import tiny, write_text

from stages.train import __main__ as train


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
def compiled_programs_stay():
    """Fine-tuning drops compiled programs, for they take memory; here the next run needs them again."""
    with pytest.MonkeyPatch.context() as patch:
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

"""The life of a model: what runs and a server's log say of weights, data, cost and time."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cli import run_bench
from bench.life.__main__ import LifeFlags, even_tokens, measure_life
from bench.life.planned import planned_rows
from bench.life.stages import check_one_life, serving_row
from engine.errors import UserError
from engine.inference.config import EngineConfig
from engine.storage.digest import digest
from engine.storage.model_loader import load_model
from stages.finetune import __main__ as finetune
from stages.train import __main__ as train

ROOT = Path(__file__).resolve().parents[2]

main = functools.partial(run_bench, "bench.life", None, LifeFlags, measure_life)


def entry(time, seconds, status=200, **fields):
    return json.dumps(
        {"time": f"2026-11-26T12:00:{time:06.3f}+00:00", "status": status, "seconds": seconds}
        | {"prompt_tokens": 7, "completion_tokens": 5}
        | fields
    )


LOG = "\n".join([
    "weights   int8, 93 MB, SHA-256 0123456789abcdef",
    entry(10, 2), entry(11, 0.5), entry(11.5, 1), entry(20, 1), entry(30, 9, status=400), '{"completion_tokens": 5, "sta',
    "Stopped. Weights unchanged: SHA-256 0123456789abcdef; 0 programs compiled since all were there.",
])  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a training run and of a fine-tuning run on it, and a log."""
    folder = tmp_path_factory.mktemp("life")
    (folder / "text.txt").write_text("The sea is wide, and ships go down to it in the morning.\n" * 200)
    row = '{"prompt": "the sea of %d", "completion": "is wide."}\n'
    (folder / "chats.jsonl").write_text("".join(row % number for number in range(8)))
    few = ["--steps", "6", "--context", "32", "--batch", "2"]
    text = ["--data", str(folder / "text.txt"), "--out-dir", str(folder / "trained"), "--tokenizer", "bpe:300"]
    assert train.main(["tiny", *text, *few]) == 0
    chats = ["--model", str(folder / "trained"), "--data", str(folder / "chats.jsonl"), "--out-dir", str(folder / "tuned")]
    assert finetune.main([*chats, *few, "--general", "none", "--lora", "rank=2,targets=q"]) == 0
    model = load_model(str(folder / "tuned"))
    served = digest(EngineConfig(weights="int8").prepare_params(model.cfg, model.params))
    (folder / "server.log").write_text(LOG.replace("0123456789abcdef", served[:16]))
    return folder


def life(runs, *more):
    return main(["--trained", str(runs / "trained"), "--tuned", str(runs / "tuned"), "--log", str(runs / "server.log"), *more])


def test_each_stage_is_told_from_its_own_files(runs, capsys):
    assert life(runs, "--watts", "100", "--price", "3.6", "--out", str(runs / "page")) == 0
    printed = capsys.readouterr().out
    document = json.loads((runs / "page" / "life.json").read_text())
    training, tuning, serving = document["rows"]
    assert (training["moved"], tuning["moved"], serving["moved"]) == (training["leaves"], 0, 0)
    assert tuning["pairs"] == 2  # q of each of two layers
    assert training["before"] != training["after"] == tuning["before"] == tuning["after"]
    assert training["tokens"] == pytest.approx(6 * 2 * 32)
    for row in document["rows"]:
        assert row["joules"] == pytest.approx(100 * row["seconds"])
        assert row["usd"] == pytest.approx(row["seconds"] / 1000)
    assert "Energy: assumed 100 W (--watts)." in printed
    source = (runs / "page" / "life.html").read_text()
    said = [line[11:] for line in printed.splitlines() if line.startswith("  ")]
    assert len(said) == 6 * 5
    assert [words for words in said if words not in source] == []
    assert "http" not in source
    assert "<script" not in source


def test_a_log_says_what_was_answered(tmp_path):
    (tmp_path / "log").write_text(LOG)
    row = serving_row(tmp_path / "log")
    assert (row["requests"], row["tokens"], row["prompt_tokens"], row["moved"]) == (4, 20, 28, 0)
    assert row["seconds"] == pytest.approx(2.5 + 1)  # those under way together count once
    assert row["before"] == row["after"] == "0123456789abcdef"
    (tmp_path / "log").write_text(LOG.replace("unchanged", "CHANGED from 0123456789abcdef"))
    assert serving_row(tmp_path / "log")["moved"] == 1
    (tmp_path / "log").write_text("\n".join(LOG.splitlines()[:2]))  # still running
    assert serving_row(tmp_path / "log")["moved"] is None
    (tmp_path / "log").write_text(LOG.splitlines()[1])
    with pytest.raises(UserError, match="does not say which weights were served"):
        serving_row(tmp_path / "log")
    (tmp_path / "log").write_text("ready\n")
    with pytest.raises(UserError, match="holds no answered request"):
        serving_row(tmp_path / "log")


@pytest.mark.journeys
def test_without_the_extra_of_the_server_nothing_begins():
    program = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'starlette' else find(name, *a)\n"
        "import runpy; runpy.run_module('bench.life', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program, "--watts", "90"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "needs starlette: start it with `uv run --extra serve python -m bench.life --watts 90`" in line


def test_serving_costs_as_much_as_training_after_so_many_tokens():
    rows = [{"seconds": 60.0}, {"seconds": 9.0}, {"seconds": 3.0, "tokens": 100}]
    assert even_tokens(rows) == 2000
    large = planned_rows()
    hours = large["rows"][0]["hours"]
    assert hours[0] < large["published_hours"] < hours[2]
    assert [row["trained"] for row in large["rows"]][2] == 0


def test_what_cannot_be_read_is_one_sentence(runs, tmp_path, capsys):
    trained, tuned, log = (str(runs / name) for name in ("trained", "tuned", "server.log"))
    with pytest.raises(UserError, match="was not tuned from"):
        check_one_life({"trained": runs, "tuned": runs}, {"trained": {"after": "a" * 64}, "tuned": {"before": "b" * 64}})
    (tmp_path / "log").write_text(LOG)
    for flags, words in (
        (["--trained", trained, "--tuned", tuned, "--log", str(tmp_path / "log")], "had SHA-256 0123456789abcdef, which"),
        (["--trained", trained, "--log", log], "is of a server of another model"),
        (["--tuned", tuned], "as --trained"), (["--log", log], "as --trained"),
        (["--price", "0"], "--price must be"), (["--watts", "nan"], "--watts must be"),
        (["--log", str(tmp_path / "no")], "is not there"), (["--trained", str(tmp_path)], "is no finished run"),
        (["--trained", str(runs / "tuned")], "give it as --tuned"),
        (["--trained", str(runs / "trained"), "--tuned", str(runs / "trained")], "give it as --trained"),
    ):  # fmt: skip
        assert main(flags) == 2, flags
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error

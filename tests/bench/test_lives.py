"""The lives of a real model, recorded by the real command, and the laws that hold in what was recorded: at night.

By default a tiny model answers, tests/stages/test_recorder.py tests what training records, and
test_lives_page.py the page.
"""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.cli import run_bench, run_module
from bench.lives.__main__ import LivesFlags, measure_lives
from bench.lives.recording import answer_requests, read_life, step_reporter
from engine.counting import hardware
from engine.errors import UserError
from engine.model.paths import leaf_paths
from engine.storage.digest import digest
from engine.text.tokenizer import byte_tokenizer
from tests.tiny import SMALL_MATRICES, lively_params, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def lives(*flags):
    return [sys.executable, "-m", "bench.lives", *map(str, flags)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"The {i * 7919 % 1000}th ship of {i * 31 % 97} goes down to the sea.\n" for i in range(3000))
    )
    return path


@pytest.fixture(scope="module")
def page(text, tmp_path_factory):
    """The folder of a quick recording."""
    folder = tmp_path_factory.mktemp("lives")
    words = lives("--quick", "--data", text, "--price", "0.2", "--watts", "90", "--out", folder)
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "A model of" in run.stdout
    return folder


@pytest.fixture(scope="module")
def document(page):
    return json.loads((page / "lives.json").read_text())


@pytest.mark.night
@pytest.mark.journeys
def test_training_moves_what_trains_and_no_bit_of_what_is_frozen(document):
    frozen = {}
    for name, life in document["lives"].items():
        tensors, frames = life["begin"]["tensors"], life["frames"]
        trained = {tensor["path"] for tensor in tensors if tensor["trainable"]}
        frozen[name] = len(tensors) - len(trained)
        assert [frame["frozen_changed"] for frame in frames] == [0] * len(frames), name
        assert frames[4]["gradient_norms"].keys() == trained, name
        for frame in frames[4:]:
            assert frame["changed_in"].keys() == trained, name
            assert all(frame["changed_in"].values()), (name, frame["step"])
        assert len({frame["digest"] for frame in frames[3:]}) == len(frames[3:]), name
        assert frames[-1]["digest"] == life["end"]["digest"], name
        assert (frames[-1]["step"], life["steps"][-1]["step"]) == (life["end"]["step"],) * 2, name
    first, *_, last = document["lives"]["train"]["frames"]
    assert first["sample"] != last["sample"]
    assert frozen["train"] == frozen["all"] == 0
    assert frozen["frozen"] > 0
    assert frozen["lora"] == len(
        document["lives"]["train"]["begin"]["tensors"]
    )  # the pairs lie beside all of them


@pytest.mark.night
@pytest.mark.journeys
def test_answering_changes_no_bit_and_no_request_knows_of_another(document):
    train = document["lives"]["train"]
    check_answers(document["answer"], train["begin"]["params"], train["end"]["digest"])


def test_a_runs_progress_is_a_line_a_change(tmp_path, capsys, monkeypatch):
    """In a pipe, where lines stay, they are further apart than on a terminal."""
    recording = tmp_path / "run.jsonl"
    report = step_reporter(recording)
    report()
    for event in (
        {"event": "begin", "step": 0},
        {"event": "step", "step": 1200},
        {"event": "measure", "step": 1300},
    ):
        with recording.open("a") as file:
            file.write(json.dumps(event) + "\n")
        report()
        report()
    lines = ["  step 0", "  step 1,200", "  step 1,300, the last; its result is measured"]
    assert capsys.readouterr().err.splitlines() == lines
    calls = []
    monkeypatch.setattr("bench.cli.REPORT_SECONDS", 300)
    monkeypatch.setattr("bench.cli.PIPED_REPORT_SECONDS", 0.01)
    run_module(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(0.2)"], lambda: calls.append(1))
    assert calls


@pytest.mark.whole
def test_a_tiny_model_answers_so_too():
    tokenizer = byte_tokenizer()
    cfg = tiny_config(vocab=tokenizer.vocab)
    params = lively_params(cfg)
    count = sum(leaf.size for leaf in leaf_paths(params).values())
    model = SimpleNamespace(cfg=cfg, params=params, tokenizer=tokenizer)
    check_answers(answer_requests(model, "\n"), count, digest(params))


def check_answers(answer, params, sha):
    assert (answer["asked"], answer["changed"], answer["of"]) == (100, 0, params)
    assert answer["before"] == answer["after"] == sha
    assert len(answer["answers"]) == 12
    first, second, edited = answer["independent"]
    assert answer["same_alone"]
    assert min(answer["token_seconds"].values()) > 0
    assert edited["edited"]
    assert len({first["text"], second["text"], edited["text"]}) == 3
    *growing, dropped = answer["cache_bytes"]
    assert dropped == 0
    (position,) = {after - before for before, after in itertools.pairwise(growing)}
    assert growing[0] % position == 0


@pytest.mark.night
@pytest.mark.journeys
def test_costs_are_near_what_counting_predicts(document):
    costs = {row["stage"]: row for row in document["cost"]}
    counted = {stage: row["counted_ratio"] for stage, row in costs.items()}
    assert counted == pytest.approx({"train": 3, "frozen": 2.2, "lora": 2, "all": 3, "answer": 1}, rel=0.15)
    assert costs["answer"]["time_ratio"] == 1
    for stage, row in costs.items():
        assert row["counted_ratio"] / 2 < row["time_ratio"] < 2.5 * row["counted_ratio"], (
            stage
        )  # others use the machine too
        assert row["flops_per_token"] > 2 * 0.5 * document["params"]
    for life in (*document["lives"].values(), document["answer"]):
        kinds = life["memory"]["bytes"]
        assert {len(column) for column in kinds.values()} == {min(400, len(kinds["parameters"]))}
    assert document["answer"]["memory"]["backward"] is None
    assert max(document["answer"]["memory"]["bytes"]["KV cache"]) > 0
    train = document["lives"]["train"]["memory"]
    assert 0 < train["backward"] < train["update"]
    assert costs["answer"]["bytes"] < costs["lora"]["bytes"] < costs["train"]["bytes"]


@pytest.mark.night
@pytest.mark.journeys
def test_the_page_is_one_file_that_needs_no_network(page, document):
    source = (page / "lives.html").read_text()
    assert len(source.encode()) <= 1_500_000
    assert document["answer"]["before"] in source
    assert {"lives.html", "lives.json"} <= {path.name for path in page.iterdir()}
    assert (document["flags"]["price"], document["flags"]["watts"]) == (0.2, 90)


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.night)])
def test_a_signal_ends_the_runs_too(number, text, tmp_path):
    """The signal goes to the command alone, as `kill` sends it."""
    process = subprocess.Popen(
        lives("--data", text, "--out", tmp_path),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (
        running := [child for child in children.read_text().split() if "stages.train" in command_line(child)]
    ):
        assert process.poll() is None
        time.sleep(0.05)
    while (
        "jaxlib" not in Path(f"/proc/{running[0]}/maps").read_text()
    ):  # it runs for a while: it is waited for
        time.sleep(0.05)
    process.send_signal(number)
    assert process.communicate(timeout=300)[1].endswith("stopped\n")
    assert process.returncode == 130
    assert "stages.train" not in command_line(running[0])
    assert [*tmp_path.iterdir()] == []


def command_line(pid):
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "demmo"], "Did you mean 'demo'?"),
        pytest.param(["--price", "0"], "--price must be a number above 0", marks=pytest.mark.whole),
        pytest.param(["--watts", "nan"], "--watts must be a number above 0", marks=pytest.mark.whole),
        pytest.param(["--data", "nowhere.txt"], "nowhere.txt", marks=pytest.mark.whole),
        (["--out", "/proc/no"], "cannot be written"),
    ],
)
def test_what_cannot_be_recorded_is_a_sentence(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(hardware, "MEASURE_PROGRAM", SMALL_MATRICES + hardware.MEASURE_PROGRAM)
    code = run_bench("bench.lives", "", LivesFlags, measure_lives, ["--out", str(tmp_path), *flags])
    printed = capsys.readouterr().err
    error = printed.splitlines()[-1]
    assert (code, error.startswith("error: "), words in error) == (2, True, True), printed
    assert "Traceback" not in printed


def test_a_run_that_was_not_recorded_to_its_end_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    with pytest.raises(UserError, match=r"train\.jsonl does not hold a run from its beginning to its end"):
        read_life(path)
    path.write_text(
        '{"event": "begin"}\n{"event": "frame"}\n{"event": "end", "st'
    )  # of a run that was killed
    with pytest.raises(UserError, match="does not hold"):
        read_life(path)

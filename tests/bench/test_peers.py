"""A peer answers in turns from its own interpreter; what is not there is named. The peers here are pretended ones."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

from bench import models
from bench.cli import Shape, parse_shape
from bench.peers import __main__ as peers
from bench.peers import measure
from bench.peers import process as module
from bench.peers.process import Peer, PeerError, start_peer
from engine.errors import UserError
from engine.training.optimizer import OptimizerConfig, make_optimizer

BENCH = Path(module.__file__).parent
THIS = Path(sys.executable)
TRAINED = "lambda spec: lambda: {'loss': 1.0}"
GENERATED = "lambda spec: lambda: {'tokens': [[0] * spec['new']] * len(spec['prompts'])}"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Where peers are looked for; called with a name, what it needs and how it makes jobs, writes one."""
    shutil.copy(BENCH / "protocol.py", tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path)

    def write(name="fake.py", needs="json", make="lambda spec: lambda: {}"):
        (tmp_path / name).write_text(f"from protocol import serve_jobs\nserve_jobs([{needs!r}], {make})\n")

    return write


@pytest.fixture
def talk(scripts):
    """Starts a pretended peer, past its greeting, and ends it after the test."""
    open_peers = []

    def start(make):
        scripts(make=make)
        open_peers.append(Peer(THIS, "fake.py"))
        assert list(open_peers[-1].read()["versions"]) == ["json"]
        return open_peers[-1]

    yield start
    for entry in open_peers:
        entry.close()


# The conversation


def test_a_job_is_made_once_and_each_round_is_one_run(talk):
    peer = talk("lambda spec: iter(spec['said']).__next__")
    answers = []
    again = peer.prepare("count", {"said": [{"n": 1}, {"n": 2}, {"n": 3}]}, answers.append)
    again()
    again()
    assert [answer["n"] for answer in answers] == [1, 2, 3]
    assert all(answer["seconds"] >= 0 for answer in answers)
    peer.ask(drop="count")
    with pytest.raises(PeerError, match="KeyError: 'count'"):
        peer.ask(run="count")


def test_what_a_library_prints_does_not_reach_the_answers_nor_where_ours_finds_modules_the_peer(talk, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    loud = "print('hello') or __import__('os').system('echo hello') or {'path': __import__('os').environ.get('PYTHONPATH')}"
    peer = talk(f"lambda spec: lambda: {loud}")
    peer.prepare("loud", {}, lambda answer: None)
    assert peer.ask(run="loud")["path"] is None


def test_a_peer_that_dies_leaves_its_last_words(talk):
    peer = talk("lambda spec: lambda: __import__('os').write(2, b'killed by a bug') and __import__('os')._exit(3)")
    with pytest.raises(PeerError, match="it is gone; its last words: killed by a bug"):
        peer.prepare("job", {}, print)
    assert peer.has_ended
    with pytest.raises(PeerError, match="it is gone"):
        peer.ask(run="job")


# What is not there


def test_an_absent_library_is_named_with_what_installs_it_and_that_is_no_failure(scripts, capsys):
    scripts("torch_peer.py", needs="torch_that_nobody_has")
    scripts("transformers_peer.py", needs="transformers_that_nobody_has")
    assert peers.main(["--quick", "--json"]) == 0
    out, tables = capsys.readouterr()
    document = json.loads(out)
    assert document["rows"] == []
    assert [entry["name"] for entry in document["absent"]] == ["torch_that_nobody_has", "transformers_that_nobody_has"]
    assert all("ModuleNotFoundError" in entry["reason"] for entry in document["absent"])
    assert tables.count("to have it: pip install -e '.[peers]'") == 2
    absent = []
    with start_peer(THIS, "transformers_peer.py", absent) as peer:
        assert peer is None
    assert absent[0]["install"] == f"{THIS} -m pip install transformers_that_nobody_has"


@pytest.mark.parametrize(
    ("python", "words"),
    [("/no/such/python", "No such file or directory"), (str(BENCH), "Permission denied"), ("/bin/true", "does not answer")],
)
def test_what_is_no_python_is_refused_in_a_sentence(python, words, capsys):
    assert peers.main(["--peer-python", python]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert python in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "6x100x256x16"], "--shape is LAYERSxWIDTHxTOKENSxBATCH"),
        (["--shape", "six"], "not 'six'"),
        (["--rounds", "2"], "--rounds must be at least 6, not 2"),
        (["--new", "1"], "--new must be at least 2"),
        (["--preset", "smollm"], "no preset 'smollm'"),
        (["--preset", "tiny", "--prompt", "64"], "do not fit tiny's context of 64"),
        (["--dtypes"], "--dtypes needs"),
        (["--dtypes", "int8"], "int8"),
        (["--fo", "training"], "--fo"),
    ],
)
def test_flags_that_cannot_be_measured_are_refused_before_anything_starts(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(peers, "start_peer", lambda *_: pytest.fail("a peer was started"))
    assert peers.main(flags) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_model_too_large_for_this_machine_is_refused(monkeypatch):
    monkeypatch.setattr("engine.counting.hardware.memory_limit_bytes", lambda: 10**9)
    with pytest.raises(UserError, match=r"twice in memory needs about 2.2 GB, and 1.0 GB are available; give a smaller"):
        measure.check_preset("smollm2-135m", 256, 33)


# The table


def test_training_beside_a_pretended_peer_that_computes_something_else(scripts, capsys):
    scripts("torch_peer.py", make=TRAINED)
    flags = ["--of", "training", "--shape", "1x64x8x2", "--dtypes", "float32", "--rounds", "6"]
    assert peers.main([*flags, "--peer-python", str(THIS), "--json"]) == 0
    out, tables = capsys.readouterr()
    table = json.loads(out)["rows"]
    assert [(row["name"], row["peer"]) for row in table] == [
        ("train_1x64x8x2_float32", "torch compiled"), ("train_1x64x8x2_float32", "torch eager")
    ]  # fmt: skip
    for row in table:
        assert row["ours_seconds"] > 0
        assert row["ratio"] is None or row["ratio"] > 0
        assert (row["peer_loss"], row["same"]) == (1.0, False)
        assert 4 < row["loss"] < 6
    assert tables.count("** not the same computation **") == 2


def test_a_compiler_that_is_not_there_leaves_the_other_rows(scripts, capsys):
    scripts("torch_peer.py", make=f"lambda spec: 1 / 0 if spec['compile'] else ({TRAINED})(spec)")
    assert peers.main(["--of", "training", "--shape", "1x64x8x2", "--dtypes", "float32", "--rounds", "6", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["peer"] for row in document["rows"]] == ["torch eager"]
    assert document["absent"][0]["name"] == "torch compiled, float32"
    assert "division by zero" in document["absent"][0]["reason"]
    assert "g++" in document["absent"][0]["install"]


def test_inference_counts_the_tokens_that_are_the_same(scripts, monkeypatch, capsys):
    monkeypatch.setattr(measure, "DECODE_PROMPT", 8)
    monkeypatch.setattr(measure, "make_greedy", lambda cfg, weights, prompts, new, message: lambda: message.update(
        ours=[[0] * (new - 1) + [7]] * len(prompts)
    ))  # fmt: skip
    scripts("transformers_peer.py", make=GENERATED)
    flags = ["--of", "inference", "--preset", "tiny", "--prompt", "8", "--new", "4", "--dtypes", "float32", "--rounds", "6"]
    assert peers.main([*flags, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["name"], row["same_tokens"]) for row in table] == [
        ("prefill_1_float32", 0.0), ("prefill_8_float32", 0.0), ("decode_1_float32", 0.75), ("decode_8_float32", 0.75)
    ]  # fmt: skip


# What the peers are made of


@pytest.mark.parametrize("script", ["protocol.py", "torch_peer.py", "transformers_peer.py"])
def test_a_peer_script_needs_nothing_of_ours_and_runs_in_an_older_python(script):
    tree = ast.parse((BENCH / script).read_text(), feature_version=(3, 10))
    result = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    result |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in result} - set(sys.stdlib_module_names)
    assert roots <= {"protocol", "torch", "numpy", "transformers"}


def test_a_shape_is_read_and_written_the_same_way():
    assert str(parse_shape("--shape", "2x128x64x8")) == "2x128x64x8"
    for wrong in ("2x128x64", "2x100x64x8", "0x64x8x2", "ax64x8x2", "2x64x8x-2"):
        with pytest.raises(UserError, match=f"--shape is LAYERSxWIDTHxTOKENSxBATCH .* not '{wrong}'"):
            parse_shape("--shape", wrong)


def test_two_calls_of_one_work_take_the_same_steps():
    inputs, tx = models.make_step_inputs(Shape(1, 64, 8, 2), "float32"), make_optimizer(OptimizerConfig())
    step, again = (models.make_step(inputs, tx) for _ in range(2))
    first = [float(step()) for _ in range(3)]
    assert first == [float(again()) for _ in range(3)]
    assert len(set(first)) == 3

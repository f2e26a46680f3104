"""A peer answers in turns from its own interpreter; what is not there is named. The peers here are pretended ones."""

import ast
import ctypes
import functools
import importlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from bench.cli import run_bench
from bench.peers import __main__ as peers
from bench.peers import mkl
from bench.peers import process as module
from bench.peers.process import Peer, PeerError, start_peer

BENCH = Path(module.__file__).parent
ROOT = BENCH.parents[1]
THIS = Path(sys.executable)
main = functools.partial(run_bench, "bench.peers", None, peers.PeersFlags, peers.measure_peers)
TRAINED = "lambda spec: lambda: {'loss': 1.0}"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Where peers are looked for; called with a name, what it needs and how it makes jobs, writes
    one.
    """
    shutil.copy(BENCH / "protocol.py", tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path)

    def write(name="fake.py", needs="json", make="lambda spec: lambda: {}"):
        (tmp_path / name).write_text(
            f"from protocol import serve_jobs\nserve_jobs([{needs!r}], {make}, str)\n"
        )

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
    peer.ask(make="count", spec={"said": [{"n": 1}, {"n": 2}, {"n": 3}]})
    answers = [peer.ask(run="count") for _ in range(3)]
    assert [answer["n"] for answer in answers] == [1, 2, 3]
    assert all(answer["seconds"] >= 0 for answer in answers)
    peer.ask(drop="count")
    with pytest.raises(PeerError, match="KeyError: 'count'"):
        peer.ask(run="count")


def test_what_a_library_prints_does_not_reach_the_answers_nor_where_ours_finds_modules_the_peer(
    talk, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    loud = "print('hello') or __import__('os').system('echo hello') or {'path': __import__('os').environ.get('PYTHONPATH')}"
    peer = talk(f"lambda spec: lambda: {loud}")
    peer.ask(make="loud", spec={})
    assert peer.ask(run="loud")["path"] is None


def test_a_peer_that_dies_leaves_its_last_words(talk):
    peer = talk(
        "lambda spec: lambda: __import__('os').write(2, b'killed by a bug') and __import__('os')._exit(3)"
    )
    peer.ask(make="job", spec={})
    with pytest.raises(PeerError, match="it is gone; its last words: killed by a bug"):
        peer.ask(run="job")
    assert peer.process.poll() is not None
    with pytest.raises(PeerError, match="it is gone"):
        peer.ask(run="job")


def test_mkl_is_answered_that_the_processor_is_intels_on_amds_alone(monkeypatch, scripts):
    vendor = {"vendor_id": "AuthenticAMD"}
    monkeypatch.setattr(mkl, "read_model_numbers", lambda: vendor)
    scripts(make="lambda spec: lambda: {'preloaded': __import__('os').environ.get('LD_PRELOAD')}")
    with mkl.answer_for_mkl() as library:
        assert ctypes.CDLL(str(library)).mkl_serv_intel_cpu_true() == 1
        with start_peer(THIS, "fake.py", preload=library) as peer:
            peer.ask(make="look", spec={})
            assert peer.ask(run="look")["preloaded"] == str(library)
    assert not library.exists()
    vendor["vendor_id"] = "GenuineIntel"
    with mkl.answer_for_mkl() as library:
        assert library is None


def test_without_a_compiler_mkl_is_left_as_it_is_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(mkl, "read_model_numbers", lambda: {"vendor_id": "AuthenticAMD"})
    monkeypatch.setenv("PATH", "/nowhere")
    with mkl.answer_for_mkl() as library:
        assert library is None
    assert "install a C compiler" in capsys.readouterr().out


# What is not there


def test_an_absent_library_is_named_with_what_installs_it_and_that_is_no_failure(scripts, capsys):
    scripts("torch_peer.py", needs="torch_that_nobody_has")
    assert main(["--quick", "--json"]) == 0
    out, tables = capsys.readouterr()
    document = json.loads(out)
    assert document["rows"] == []
    assert "absent: torch_that_nobody_has (ModuleNotFoundError" in tables
    make_venv = "python3 -m venv peers && peers/bin/pip install -c bench/peers/requirements.txt torch numpy"
    assert f"to have it: {make_venv}, and --peer-python peers/bin/python" in tables
    with start_peer(THIS, "torch_peer.py") as peer:
        assert peer is None
    assert (
        f"to have it: {THIS} -m pip install -c bench/peers/requirements.txt torch_that_nobody_has"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("/no/such/python", "No such file or directory"),
        (str(BENCH), "Permission denied"),
        ("/bin/true", "does not answer"),
    ],
)
def test_what_is_no_python_is_refused_in_a_sentence(python, words, capsys):
    assert main(["--peer-python", python]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert python in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "6x100x256x16"], "--shape is LAYERSxWIDTHxTOKENSxBATCH"),
        (["--shape", "six"], "not 'six'"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--of", "serving", "--new", "1"], "--new must lie between 2 and"),
        (["--dtypes"], "--dtypes needs"),
        (["--dtypes", "int8"], "int8"),
        (["--fo", "training"], "--fo"),
    ],
)
def test_flags_that_cannot_be_measured_are_refused_before_anything_starts(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(peers, "start_peer", lambda *_: pytest.fail("a peer was started"))
    assert main(flags) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


# The table


@pytest.fixture
def no_bar(monkeypatch):
    """A pretended peer is faster or not, as the machine is busy, which the exit code would say."""
    monkeypatch.setattr("bench.peers.training.OVER_TORCH", {"float32": None})


@pytest.mark.whole
@pytest.mark.usefixtures("no_bar")
def test_training_beside_a_pretended_peer_that_computes_something_else(scripts, capsys):
    scripts("torch_peer.py", make=TRAINED)
    flags = ["--of", "training", "--shape", "1x64x8x2", "--dtypes", "float32", "--rounds", "6"]
    assert main([*flags, "--peer-python", str(THIS), "--json"]) == 0
    out, tables = capsys.readouterr()
    table = json.loads(out)["rows"]
    assert [(row["name"], row["peer"]) for row in table] == [
        ("train_1x64x8x2_float32", "torch compiled"),
        ("train_1x64x8x2_float32", "torch eager"),
    ]
    for row in table:
        assert row["ours_seconds"] > 0
        assert row["ratio"] is None or row["ratio"] > 0
        assert (row["peer_loss"], row["same"]) == (1.0, False)
        assert 4 < row["loss"] < 6
    assert tables.count("** not the same computation **") == 2


@pytest.mark.whole
@pytest.mark.usefixtures("no_bar")
def test_a_compiler_that_is_not_there_leaves_the_other_rows(scripts, capsys):
    scripts("torch_peer.py", make=f"lambda spec: 1 / 0 if spec['compile'] else ({TRAINED})(spec)")
    assert (
        main(["--of", "training", "--shape", "1x64x8x2", "--dtypes", "float32", "--rounds", "6", "--json"])
        == 0
    )
    out, tables = capsys.readouterr()
    assert [row["peer"] for row in json.loads(out)["rows"]] == ["torch eager"]
    assert "absent: torch compiled, float32 (ZeroDivisionError: division by zero)" in tables
    assert "g++" in tables


@pytest.mark.usefixtures("no_bar")
def test_without_any_way_of_torch_there_are_no_rows(scripts, capsys):
    scripts("torch_peer.py", make="lambda spec: 1 / 0")
    flags = ["--of", "training", "--shape", "1x64x8x2", "--dtypes", "float32", "--rounds", "6", "--json"]
    assert main(flags) == 0
    out, tables = capsys.readouterr()
    assert json.loads(out)["rows"] == []
    assert tables.count("absent: torch") == 2


# What the peers are made of


def test_the_peers_are_pinned_and_none_is_a_package_of_the_project():
    lines = (BENCH / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in pins.values())
    assert {
        "torch",
        "numpy",
        "trl",
        "transformers",
        "datasets",
        "llama-cpp-python",
        "mistralrs",
    } == pins.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [package for extra in project["optional-dependencies"].values() for package in extra]
    ours = {re.match(r"[\w-]+", package)[0] for package in project["dependencies"] + extras}
    assert ours & pins.keys() == {"numpy"}


def test_what_uv_resolves_for_a_clone_are_wheels_alone():
    """A package without a wheel is built for its metadata by the first `uv run`, whichever extras
    it asks for.
    """
    lock = ROOT / "uv.lock"
    if not lock.exists():
        pytest.skip("uv has not resolved the project here")
    packages = {package["name"]: package for package in tomllib.loads(lock.read_text())["package"]}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if {*packages.pop("thrice")["metadata"]["provides-extras"]} != extras.keys():
        pytest.skip("uv.lock is older than pyproject.toml")
    assert [name for name, package in packages.items() if not package.get("wheels")] == []


def test_llama_cpp_is_tried_with_and_without_flash_attention_and_on_half_the_threads_where_prompts_are_short(
    monkeypatch,
):
    monkeypatch.syspath_prepend(BENCH)
    peer = importlib.import_module("llama_cpp_peer")

    def tried(threads, prompts, phase):
        spec = {"threads": threads, "prompts": prompts, "phase": phase}
        return [tuple(setting) for setting in peer.settings(spec)]

    every = [(True, 4), (False, 4), (True, 2), (False, 2)]
    assert tried(4, [[0] * 512] * 2, "decode") == every
    assert tried(4, [[0] * 2048], "decode") == every[:2]
    assert tried(4, [[0] * 128], "prefill") == every
    assert tried(4, [[0] * 512], "prefill") == every[:2]
    assert len(tried(1, [[0]], "decode")) == 2


@pytest.fixture
def tries(monkeypatch):
    """The peer's module, and the tries that its `find_fastest` makes: each setting and its number of answers.

    The first try of all is the slowest, which says nothing of its setting where it is tried again. A
    try takes a second for each prompt.
    """
    monkeypatch.syspath_prepend(BENCH)
    peer = importlib.import_module("llama_cpp_peer")
    runs = []
    touched = []
    clock = [0.0]

    class Streams:
        def __init__(self, model, spec, setting):
            self.setting = setting
            self.prompts = len(spec["prompts"])
            self.open = True

        def touch_weights(self):
            touched.append(self.setting)

        def run(self, new, most_answers):
            assert touched, "the weights were read before any try"
            runs.append((self.setting, most_answers))
            clock[0] += self.prompts
            seconds = 1.0 + self.setting.threads + (not self.setting.flash_attention)
            if len(runs) == 1:
                seconds = 9.0
            return {"decode": seconds, "prefill": -seconds}

        def close(self):
            self.open = False

    monkeypatch.setattr(peer, "Streams", Streams)
    monkeypatch.setattr(peer.time, "perf_counter", lambda: clock[0])
    return peer, runs


def test_llama_cpp_runs_in_the_setting_of_the_shortest_try(tries):
    peer, runs = tries
    spec = {"threads": 2, "prompts": [[0] * 9], "new": 3, "phase": "decode"}
    fastest = peer.Jobs().find_fastest(spec)
    assert fastest.setting == (True, 1)
    assert fastest.open
    assert runs == 3 * [((flash, threads), 2) for threads in (2, 1) for flash in (True, False)]
    assert peer.Jobs().find_fastest(spec | {"phase": "prefill"}).setting == (False, 2)


def test_settings_of_llama_cpp_that_take_long_are_tried_once(tries):
    peer, runs = tries
    spec = {"threads": 2, "prompts": [[0] * 512] * 8, "new": 3, "phase": "decode"}
    peer.Jobs().find_fastest(spec)
    assert [setting for setting, _ in runs] == [(True, 2), (False, 2)]


def test_a_peer_says_how_it_was_built(talk):
    peer = talk("lambda spec: lambda: {}")
    assert peer.ask(about="build") == {"versions": {"json": json.__version__}, "build": ""}


@pytest.mark.parametrize("script", ["protocol.py", "torch_peer.py", "llama_cpp_peer.py", "mistral_peer.py"])
def test_a_peer_script_needs_nothing_of_ours_and_runs_in_an_older_python(script):
    tree = ast.parse((BENCH / script).read_text(), feature_version=(3, 10))
    result = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    result |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in result} - set(sys.stdlib_module_names)
    assert roots <= {"protocol", "torch", "numpy", "llama_cpp", "mistralrs"}

"""Every command of every README is run here, as it is written, but for flags that make it short: by day in this process."""

import gc
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest
import tyro

from bench.cli import ROOT
from bench.docs.readmes import PICTURED, PICTURES, sh_commands, shown, written
from bench.stages.report import write_pictures
from engine.model.paths import leaf_paths
from tests.tiny import SMALL

CHANGED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGPIPE,
)  # signals whose handlers commands set
COMPARED = ROOT / "tests" / "bench" / "kept" / "step.json"  # of a small step, as `--out` keeps it
READMES = [
    path
    for path in sorted(ROOT.rglob("README.md"))
    if not re.search(r"/(\.|vendor/)", str(path.relative_to(ROOT.parent)))
]
# Flags that are added so that a command takes seconds. A command that is not named here is run as
# it stands.
SHORT = {
    "stages.train": ["--max-time", "1s", "--context", "64", "--batch", "4", "--tokenizer", "bpe:300"],
    "bench.step": ["--shapes", "1x64x64x2", "--rounds", "6"],
    "bench.commands": ["--max-time", "1s"],
    "stages.finetune": ["--steps", "2", "--context", "64", "--general", "none"],
    "stages.reinforce": ["--rounds", "1", "--max-tokens", "8"],
    "stages.chat": ["--max-tokens", "8"],
    "stages.by_hand": ["--steps", "2"],
}
# Commands of minutes, those that need what a test does not install, those that write into the
# repository, and those that are another one here.
LONG = {
    "bench",
    "bench.commands",
    "bench.docs.frames",
    "bench.docs.pictures",
    "bench.docs.readmes",
    "bench.documents",
    "bench.lives",
    "bench.model",
    "bench.peers",
    "bench.serving",
    "bench.tones",
}
ALIKE = {
    "stages.serve",
    "stages.serve --model smollm2-135m-instruct",
    "stages.serve --model runs/smollm2-135m-instruct-voice",
    "bench.step --dtype float32",
    "bench.step --allocator default",
    "stages.finetune --model runs/demo-shakespeare --data voice --out-dir runs/demo-voice",
}
# No test fetches a model or trains one for minutes: the run of 20 steps stands in for them.
# Its context is too short for the preferences that are shipped.
STANDS_IN = dict.fromkeys(("smollm2-135m-instruct", "runs/demo-shakespeare"), "runs/short")
STANDS_IN["voice-preferences"] = "preferences.jsonl"


def commands(readme: Path) -> list[list[str]]:
    """Lists what follows `python` in each line of a README's sh blocks, and in code spans that
    begin with it or `uv run`.
    """
    spans = re.findall(r"`(?:uv run (?:--extra \w+ )?)?python (-m [^`]*)`", readme.read_text())
    return sh_commands(readme) + [shlex.split(span) for span in spans]


EVERY = list(dict.fromkeys(tuple(command) for readme in READMES for command in commands(readme)))
CURLS = [
    curl
    for readme in READMES
    for curl in re.findall(r"curl http://127\.0\.0\.1:8000(\S+) .*?-d '(.*?)'", readme.read_text(), re.S)
]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def is_long(command: tuple[str, ...]) -> bool:
    is_other = {"--list", "compare"} & {*command}
    return (command[1] in LONG and not is_other) or " ".join(command[1:]) in ALIKE


def short(command: tuple[str, ...], text: Path) -> list[str]:
    """Returns a README's command with the flags that make it short."""
    name, words = command[1], [STANDS_IN.get(word, word) for word in command]
    if {"--list", "recipes"} & {*words}:
        return words
    if (
        name == "bench.everything"
    ):  # of a clean checkout, which this need not be: tests/bench/test_everything.py makes one
        return [*words[:2], "--help"]
    if "compare" in words:
        return [str(COMPARED) if word in ("A", "B") else word for word in words]
    if "saving" in words:
        return [*words, "--preset", "tiny", "--steps", "1", "--rounds", "6"]
    words += SHORT.get(name, [])
    if name == "stages.train" and "--steps" in command:
        words = [*words[:2], "tiny", *words[2:], "--record", "FILE"]
        words = [word for word in words if word not in ("--max-time", "1s")]
    if "data=2,fsdp=4" in words:  # eight devices, that a plan need not have
        words += ["--dry-run", "--batch", "8"]
    if name == "stages.train" and "--data" in command:
        # The whole library is more than a test should read twice, or learn a tokenizer of.
        words += ["--out-dir", "runs/python", "--dry-run", "--tokenizer", "bytes"]
    elif name in ("stages.train", "stages.by_hand", "bench.commands"):
        words += ["--data", str(text)]
    if command[-2:] == ("--data", "voice"):
        words += ["--out-dir", "runs/smollm2-135m-instruct-voice"]
    return words + ["--base-name", "HuggingFaceTB/SmolLM2-135M-Instruct"] * (
        command[-2:] == ("--adapter", "--check")
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a text, with preferences, and with the run of 20 steps."""
    folder = tmp_path_factory.mktemp("readme")
    lines = (
        f"The {i * 7919 % 1000}th line of a small text, which says {i * 31 % 97} things.\n"
        for i in range(1500)
    )
    (folder / "text.txt").write_text("".join(lines))
    rows = ({"prompt": f"Line {i}?", "chosen": f"It says {i}.", "rejected": "No."} for i in range(20))
    (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = next(command for command in EVERY if "runs/short" in command and "stages.train" in command)
    subprocess.run(
        [sys.executable, *short(command, folder / "text.txt")], cwd=folder, env=ENVIRONMENT, check=True
    )
    return folder


BY_DAY = [command for command in EVERY if not is_long(command)]


@pytest.mark.whole
@pytest.mark.parametrize("command", BY_DAY, ids=lambda command: " ".join(command[1:]))
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_each_command_runs(command, here, monkeypatch, capfd):
    """In their order: a command may read what one before it wrote. A server alone has a process of
    its own.
    """
    words = short(command, here / "text.txt")
    if command[1] == "stages.serve":
        serve(words, here)
        return
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    monkeypatch.setattr("stages.cli.command.leave", sys.exit)
    monkeypatch.setattr("engine.sources.at_start", {})  # what a command's process may store, this one may not
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of what it starts itself
    monkeypatch.setenv("NO_COLOR", "1")
    if command[1] == "bench.step":
        for name, value in SMALL.items():
            monkeypatch.setattr(f"engine.counting.hardware.{name}", value)
    before = {number: signal.getsignal(number) for number in CHANGED}
    try:
        with pytest.raises(SystemExit) as left:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    finally:  # what a command does to its own process
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.enable()
    printed = capfd.readouterr()
    assert not left.value.code, f"{words}\n{printed.out[-2000:]}\n{printed.err[-2000:]}"
    assert printed.out or (here / words[-1]).exists()


@pytest.mark.whole
def test_the_python_of_the_readmes_runs(here, monkeypatch):
    """The README's lines, and those of the engine's that go on with them, on the run of 20 steps."""
    monkeypatch.chdir(here)
    names: dict[str, Any] = {}
    for readme in ("README.md", "engine/README.md"):
        (source,) = (
            block
            for block in re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.S)
            if "import" in block
        )
        for name, instead in STANDS_IN.items():
            source = source.replace(f'"{name}"', f'"{instead}"')
        exec(compile(source, readme, "exec"), names)
    assert names["losses"][-1] <= names["losses"][0]
    query = "blocks/0/q"
    assert not np.array_equal(leaf_paths(names["tuned"])[query], leaf_paths(names["model"].params)[query])
    assert len(names["answer"]) == 16
    for leaf in jax.tree.leaves(names["gradient"]):
        assert np.isfinite(leaf).all()
    np.testing.assert_allclose(names["loss"](names["tuned"]), names["losses"][-1], rtol=0.2)


PYTEST = re.compile(r"^(?:uv run .*|python -m )pytest *(.*?)(?: *#.*)?$", re.M)
TESTED = sorted({words for readme in READMES for words in PYTEST.findall(readme.read_text())})


@pytest.mark.night
@pytest.mark.parametrize("words", TESTED)
def test_each_command_of_tests_finds_some(words):
    command = [
        sys.executable,
        "-m",
        "pytest",
        *shlex.split(words),
        "--collect-only",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:]


@pytest.mark.night
def test_damaged_model_files_are_tried_at_length_as_is_said():
    (words,) = re.findall(
        r"`python (tests/storage/hostile.py) SEED COUNT`", (ROOT / "tests/promises/README.md").read_text()
    )
    subprocess.run([sys.executable, words, "1", "3"], cwd=ROOT, env=ENVIRONMENT, check=True)


@pytest.mark.night
@pytest.mark.journeys
@pytest.mark.parametrize("command", EVERY, ids=lambda command: " ".join(command[1:]))
def test_each_command_runs_as_it_is_typed(command, here):
    words, env = short(command, here / "text.txt"), ENVIRONMENT
    if command[1] == "stages.serve":
        serve(words, here)
        return
    # its programs are compiled anew, as their first start is measured
    if command[1] == "bench.commands":
        env = env | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(
        [sys.executable, *words],
        cwd=here,
        env=env,
        input="Hello\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if command[1] == "bench.peers" and "is not installed" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, f"{words}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    assert run.stdout or (here / words[-1]).exists()


def serve(words: list[str], folder: Path) -> None:
    """Starts the server, sends what the READMEs send by curl, and stops it."""
    words = [sys.executable, *words, "--port", "0", "--slots", "2"]
    with subprocess.Popen(
        words, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        output = ""
        while "Ctrl-C" not in output:
            output += (line := server.stdout.readline())
            assert line, output
        url = re.findall(r"page +(\S+)", output)[0]
        headers = {"content-type": "application/json"}
        replies = [httpx.post(url + path, content=body, headers=headers, timeout=300) for path, body in CURLS]
        server.send_signal(signal.SIGTERM)
        server.communicate()
    assert server.returncode == 0
    assert [reply.status_code for reply in replies] == [200] * 4, [reply.text for reply in replies]
    assert replies[0].json()["choices"][0]["message"]["role"] == "assistant"


def test_the_readme_names_the_test_command_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    assert "uv run --extra dev pytest" in text
    assert "uv run --extra dev pytest" in (ROOT / ".ci" / "run").read_text()


def sentences(readme: Path) -> list[str]:
    """Lists the sentences of a README, without code blocks, tables, headings, the addresses of
    links, and what is generated.
    """
    text = re.sub(
        r"```.*?```|<!-- \S+ of .*?<!-- end -->|<[^>]+>|^[|#].*?$",
        "\n\n",
        readme.read_text(),
        flags=re.S | re.M,
    )
    text = re.sub(r"`[^`]*`", lambda code: re.sub(r"[\s.]", "_", code[0]), re.sub(r"\]\([^)]*\)", "]", text))
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:- |\d+\. ))", text)
    return [each for part in parts for each in re.split(r"(?<=[.!?:])[\"”*)]*\s+", " ".join(part.split()))]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_has_more_than_thirty_words(readme):
    long = [
        each for each in sentences(readme) if sum(bool(re.search(r"\w", word)) for word in each.split()) > 30
    ]
    assert not long


def test_the_claims_of_the_readme_are_whole_and_short():
    claims = re.findall(r"^- “(.*)”: (.*)$", (ROOT / "README.md").read_text(), re.M)
    document = json.loads((shown() / PICTURED).read_text())
    assert {f"{claim}." for claim, _ in claims} <= {each["claim"] for each in document["claims"]}
    assert len(claims) == 6
    assert max(len(verdict.split()) for _, verdict in claims) <= 15, claims


def test_the_pictures_are_those_of_the_result(tmp_path):
    """Written by `python -m bench.docs.readmes`."""
    write_pictures(tmp_path, json.loads((shown() / PICTURED).read_text()))
    for path in tmp_path.iterdir():
        assert path.read_text() == (PICTURES / path.name).read_text(), path.name


def test_every_link_and_picture_is_there():
    for readme in READMES:
        for link, picture in re.findall(r"\]\(([^)#:]+)[^)]*\)|src=\"([^\"]+)\"", readme.read_text()):
            assert (readme.parent / (link or picture)).exists(), f"{readme}: {link}{picture}"


def test_headings_and_lines_of_trees_are_whole():
    for readme in READMES:
        text = readme.read_text()
        assert not re.findall(r"^.*\S.*[^#]## .*", text, re.M), f"{readme}: a heading stands inside a line"
        for line in (
            line for tree in re.findall(r"```tree\n(.*?)```", text, re.S) for line in tree.splitlines()
        ):
            # A folder that is no package has no docstring.
            assert line.endswith((".", "/")), f"{readme}: a docstring's first line is no sentence: {line}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_trees_and_tables_are_those_of_the_code_and_the_results(readme):
    """Written by `python -m bench.docs.readmes`."""
    assert readme.read_text() == written(readme)


@pytest.mark.parametrize(
    ("name", "devices"),
    [("slurm.sbatch", 16), ("kubernetes.yaml", 16), ("trainjob.yaml", 16), ("tpu.sh", 64)],
)
def test_the_command_of_each_cluster_file_can_be_typed(name, devices):
    from engine.mesh.processes import RESTART
    from engine.mesh.shape import check_mesh, parse_mesh
    from engine.model.config import preset
    from stages.train.flags import TrainFlags
    from stages.train.run import chosen_recipe

    text = (ROOT / "stages" / "cluster" / name).read_text()
    line = re.search(r"-m stages\.train (.*(?:\n +--.*)*)", text)[1].replace("$JOB_COMPLETION_INDEX", "1")
    flags = tyro.cli(
        TrainFlags, args=shlex.split(line), config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    )
    shape = parse_mesh(flags.mesh.mesh)
    recipe = chosen_recipe(flags, "gpu", shape)
    check_mesh(shape, preset(flags.preset), recipe.batch, recipe.accumulate)
    assert shape.devices == devices
    assert f"({RESTART}|134|137" in text or "maxRestarts" in text or "TrainJob" in text

"""Every command in the README is run here, as written, but for flags that make it short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from tiny import QUICKLY_MEASURED

from bench import MOVED

ROOT = Path(__file__).parent.parent
# Flags that are added so that a command takes seconds. A command that is not named here is run as it stands.
SHORT = {
    "stages.train": ["--max-time", "1s", "--context", "64", "--batch", "4", "--tokenizer", "bpe:300"],
    "bench.step": ["--shapes", "1x64x64x2", "--rounds", "6"],
    "bench.commands": ["--max-time", "1s"],
    # What these do is tested in tests/serve, tests/stages and tests/bench; here that they are there and explain themselves.
    **{f"bench.{name}": ["--help"] for name in ("anatomy", "life", "peers", "serving")},
    "bench": ["--help"],
    "stages.serve": ["--help"],
    "stages.finetune": ["--steps", "2", "--context", "64", "--general", "none"],
    "stages.reinforce": ["--rounds", "1", "--max-tokens", "8"],
    "stages.chat": ["--max-tokens", "8"],
    "stages.by_hand": ["--steps", "2"],
}


def commands() -> list[list[str]]:
    """Lists what follows `python` in each line of the README's sh blocks, and in code spans that begin with `uv run python`."""
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += re.findall(r"`(uv run python [^`]*)`", text)
    words = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [line[line.index("python") + 1 :] for line in words if "python" in line]


def test_the_readme_names_the_test_command_that_ci_runs():
    assert "uv run --extra dev pytest" in (ROOT / "README.md").read_text()
    assert "uv run --extra dev pytest" in (ROOT / ".ci" / "run").read_text()


def test_every_line_is_a_module_of_this_project():
    for command in commands():
        assert command[0] == "-m", command
        path = ROOT / Path(*command[1].split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), command


def test_the_old_name_of_a_measurement_prints_the_new_command():
    for old, new in MOVED.items():
        run = subprocess.run([sys.executable, "-m", old], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (2, f"error: this command is now: python -m {new}\n")
        path = ROOT / new.split()[0].replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_every_command_of_the_readme(tmp_path):
    text = tmp_path / "text.txt"
    lines = (f"The {i * 7919 % 1000}th line of a small text, which says {i * 31 % 97} things.\n" for i in range(1500))
    text.write_text("".join(lines))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    for command in commands():
        name = command[1]
        extra = [] if {"--list", "recipes"} & {*command} else list(SHORT.get(name, []))
        if name == "stages.train" and "--steps" in command:
            extra = ["tiny", *extra[2:]]
        if name in ("stages.train", "stages.by_hand", "bench.commands") and "--data" not in command:
            extra += ["--data", str(text)]
        elif name == "stages.train":
            # The whole library is more than a test should read twice, or learn a tokenizer of.
            extra += ["--out-dir", "runs/python", "--dry-run", "--tokenizer", "bytes"]
        if name != "stages.generate":
            # A test fetches no model, and trains none for minutes: the one of 20 steps stands in for them.
            stands_in = dict.fromkeys(("smollm2-135m-instruct", "runs/demo-shakespeare"), "runs/short")
            command = [stands_in.get(word, word) for word in command]
            extra += ["--out-dir", "runs/smollm2-135m-instruct-voice"] if command[-2:] == ["--data", "voice"] else []
            extra += ["--base-name", "HuggingFaceTB/SmolLM2-135M-Instruct"] if "--adapter" in command else []
        start = ["-c", QUICKLY_MEASURED] if name == "bench.step" else ["-m"]
        words = [sys.executable, *start, *command[1:], *extra]
        # Its programs are compiled anew, as their first start is measured.
        env = environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(name == "bench.commands"))}
        run = subprocess.run(
            words, cwd=tmp_path, env=env, input="Hello\n", capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, f"{command} {extra}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
        assert run.stdout, command


@pytest.mark.parametrize(("name", "devices"), [("slurm.sbatch", 16), ("kubernetes.yaml", 16), ("tpu.sh", 64)])
def test_the_command_of_each_cluster_file_can_be_typed(name, devices):
    from engine.mesh.processes import RESTART
    from engine.mesh.shape import check_mesh, parse_mesh
    from stages.train.run import TrainFlags, chosen_recipe, preset

    text = (ROOT / "stages" / "cluster" / name).read_text()
    line = re.search(r"-m stages\.train (.*(?:\n +--.*)*)", text)[1].replace("$JOB_COMPLETION_INDEX", "1")
    flags = tyro.cli(TrainFlags, args=shlex.split(line), config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    shape, recipe = parse_mesh(flags.mesh.mesh), chosen_recipe(flags, "gpu")
    check_mesh(shape, preset(flags.preset), recipe.batch, recipe.accumulate)
    assert shape.devices == devices
    assert f"({RESTART}|134|137" in text or "maxRestarts" in text, "the codes after one is killed"


def test_the_tree_is_the_tree():
    """Every line names what lies below the last line with less indentation, and no folder of Python files is left out."""
    above, named = [""], set()
    for line in (ROOT / "README.md").read_text().split("## The tree")[1].splitlines():
        if names := re.match(r"( *)((?:\w+\.py ?|\w+/ ?)+)", line):
            above = above[: len(names[1]) // 2 + 1]
            paths = [f"{above[-1]}{name.rstrip('/')}" for name in names[2].split()]
            assert [path for path in paths if not (ROOT / path).exists()] == []
            named |= {*paths}
            above.append(f"{paths[-1]}/")
    folders = {path.parent for folder in ("engine", "stages", "bench") for path in (ROOT / folder).rglob("*.py")}
    assert {str(folder.relative_to(ROOT)) for folder in folders} <= named

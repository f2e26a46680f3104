"""The engine's own laws, beside those of import-linter and ruff in pyproject.toml: what loads without which library, what only
the model may write, that the engine knows no terminal, and that each room has its line among the layers.
"""

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(file.with_suffix("").parts).removesuffix(".__init__"): (ROOT / file).read_text()
    for room in ("engine", "stages", "bench")
    for file in (path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py"))
}


def loaded(modules: list[str], *names: str) -> set[str]:
    """Which of the libraries and modules a Python has loaded that has imported these modules."""
    imports = f"import importlib, sys; [importlib.import_module(name) for name in {modules}]"
    program = f"{imports}; print(*[name for name in {names} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return {*result.stdout.split()}


BEYOND_NUMPY = tuple(
    module for module in SOURCES if re.match(r"engine\.(files|mesh|model\.(?!config)|training)", module)
)
LIGHT = {
    "engine.by_hand*": ("jax", "tokenizers", *BEYOND_NUMPY),
    "engine.inference.scheduler": ("jax", "numpy", "tokenizers"),
    "stages.*.__main__": ("jax", "numpy", "tokenizers"),
    "engine.inference.*": ("optax", "engine.training"),
}


@pytest.mark.parametrize("names", LIGHT)
def test_loads_without(names):
    """By hand needs NumPy alone, the scheduler is plain Python, --help is there within 0.3 s, and
    inference does not train.
    """
    modules = fnmatch.filter(SOURCES, names)
    assert modules
    assert loaded(modules, *LIGHT[names]) == set()


def test_what_is_loaded_is_seen():
    names = {name for names in LIGHT.values() for name in names if "." not in name} | {
        "engine.model.paths",
        "engine.training",
    }
    assert loaded(["engine.training.step", "tokenizers"], *names) == names


# Code that stands in some modules alone -> these. Ruff's own rules hold print, flax, optax and
# JAX's gradients (T20, TID251).
ONLY = {
    r"custom_[vj]+p\b|defvjps?\(|custom_gradient": "engine.model.*",
    r"sys\.(stdout|stderr|argv)|(?<![\w.])input\(|^ *(import|from) (argparse|tyro|rich)\b": "stages* bench*",
}


@pytest.mark.parametrize("pattern", ONLY)
def test_stands_in_some_modules_alone(pattern):
    """Backward rules are written in the model alone; the engine neither prints nor reads a command
    line.
    """
    users = [name for name, source in SOURCES.items() if re.search(pattern, source, re.MULTILINE)]
    assert users
    assert not [
        name for name in users if not any(fnmatch.fnmatch(name, only) for only in ONLY[pattern].split())
    ]


def test_every_room_of_the_engine_has_its_line_among_the_layers():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(
        contract["layers"] for contract in contracts if contract["name"].startswith("The engine from its top")
    )
    rooms = tuple(f"{room}." for layer in layers for room in layer.split(" | "))
    packages = {
        "engine",
        "engine.mesh",
        "engine.model",
        "engine.model.cache",
        "engine.model.weights",
    }  # a docstring each
    modules = {module for module in SOURCES if module.startswith("engine")} - packages
    assert {module for module in modules if not f"{module}.".startswith(rooms)} == set()

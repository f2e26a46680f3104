"""Who may import whom, read from the source: the argument of the project, written as folders, cannot be broken unseen."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the ground up. A module may import from lower tiers and from its own room; a room is a module or a folder of them.
TIERS = [
    {"engine.errors", "engine.format"},
    {"engine.files", "engine.allocator", "engine.model.config", "engine.model.paths", "engine.model.backend"},
    {"engine.device", "engine.model.layers", "engine.model.cache.contiguous", "engine.by_hand"},
    {"engine.model.backward", "engine.model.weights.int8", "engine.model.cache.segmented"},
    {"engine.model.weights.lora", "engine.model.chunked_cross_entropy"},
    {"engine.model.weights.lora_matmul"},
    {"engine.model.weights.matmul"},
    {"engine.model.transformer"},
    {"engine.text", "engine.storage", "engine.counting"},
    {"engine.training", "engine.inference"},
    {"stages", "bench"},
]
TIER = {room: tier for tier, rooms in enumerate(TIERS) for room in rooms}
EMPTY = {"engine", "engine.model", "engine.model.cache", "engine.model.weights"}  # packages that hold a docstring or nothing

# What differentiates, by any of JAX's names for it.
GRADIENTS = {"grad", "value_and_grad", "vjp", "jvp", "linearize", "jacrev", "jacfwd", "jacobian", "hessian"}


def sources() -> dict[str, ast.Module]:
    """{module name: syntax tree} of every file of the project's three packages."""
    found = {}
    for package in ("engine", "stages", "bench"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(file.read_text(), str(file))
    return found


SOURCES = sources()


def room_of(module: str) -> str | None:
    """The room of a module of ours: the longest prefix of its name that the table holds."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in TIER), None)


def imported(module: str, tree: ast.Module, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) for each import, also inside functions and under TYPE_CHECKING; relative ones made absolute."""
    is_package = any(name.startswith(module + ".") for name in known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:  # `from package import module` names a module, `from module import thing` does not
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in known or base in EMPTY else base


def wrong_arrows(trees: dict[str, ast.Module]) -> list[str]:
    """Each import that points up or sideways, and each module that has no place in the table."""
    faults = []
    for module, tree in trees.items():
        room = room_of(module)
        if room is None:
            if module not in EMPTY or any(imported(module, tree, set(trees))):
                faults.append(f"{module} has no place in TIERS")
            continue
        for line, target in imported(module, tree, set(trees)):
            if target.split(".")[0] not in ("engine", "stages", "bench") or target in EMPTY:
                continue
            to = room_of(target)
            if to is None:
                faults.append(f"{module}:{line} imports {target}, which has no place in TIERS")
            elif to != room and TIER[to] >= TIER[room]:
                faults.append(f"{module}:{line} imports {target}")
    return faults


def importers(library: str, trees: dict[str, ast.Module]) -> set[str]:
    """The modules that import a library, or anything inside it."""
    return {
        module
        for module, tree in trees.items()
        if any(target.split(".")[0] == library for _, target in imported(module, tree, set(trees)))
    }


def mentions(tree: ast.Module, names: set[str]) -> list[str]:
    """`line: name` wherever the code (not its comments or strings) speaks one of the names, alone or after a dot."""
    found = []
    for node in ast.walk(tree):
        spoken = {
            ast.Name: lambda n: [n.id],
            ast.Attribute: lambda n: [n.attr],
            ast.ImportFrom: lambda n: [alias.name for alias in n.names],
        }.get(type(node), lambda n: [])(node)
        found += [f"{node.lineno}: {name}" for name in spoken if name in names]
    return found


def chatter(tree: ast.Module) -> list[str]:
    """Where code would speak to a terminal or read a command line."""
    found = mentions(tree, {"print", "pprint", "input", "stdout", "stderr", "argv"})
    return found + [f"{line}: {name}" for line, name in imported("", tree, set()) if name in ("argparse", "tyro", "rich")]


def test_no_import_points_up_or_sideways():
    assert wrong_arrows(SOURCES) == []
    assert {room_of(module) for module in SOURCES} - {None} == set(TIER), "a room of the table does not exist"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.inference.made_up", "import engine.training.step"),
        ("engine.inference.made_up", "from engine.training import step"),
        ("engine.inference.made_up", "from engine import training"),
        ("engine.inference.made_up", "from ..training.loss import token_losses"),
        ("engine.inference.made_up", "def f():\n    from engine.training.loss import token_losses"),
        ("engine.training.made_up", "from engine.inference.score import score"),
        ("engine.text.made_up", "from engine.storage.digest import digest"),
        ("engine.counting.made_up", "if TYPE_CHECKING:\n    from engine.text.batch import Batch"),
        ("engine.model.layers", "from engine.model import backward"),
        ("engine.model.cache.contiguous", "from engine.model.layers import attention"),
        ("engine.model.weights.matmul", "from engine.model.transformer import forward"),
        ("engine.model.config", "from engine.files import write_json"),
        ("engine.training.made_up", "from stages import train"),
        ("stages.made_up", "from bench.timing import measure"),
        ("bench.made_up", "import stages.cli"),
        ("engine.made_up", ""),
        ("engine.model.made_up", ""),
        ("engine", "from engine.errors import UserError"),
    ],
)
def test_the_checker_sees_a_wrong_arrow(module, source):
    assert len(wrong_arrows(SOURCES | {module: ast.parse(source)})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.training.made_up", "from . import loss\nfrom .step import train_step\nfrom ..model import layers"),
        ("engine.text.made_up", "import jax\nfrom engine.errors import UserError\nfrom engine.text.batch import Batch"),
        ("stages.made_up", "import engine.training.step\nfrom engine import inference"),
    ],
)
def test_the_checker_lets_right_arrows_be(module, source):
    assert wrong_arrows(SOURCES | {module: ast.parse(source)}) == []


def test_only_the_transformer_imports_flax():
    assert importers("flax", SOURCES) == {"engine.model.transformer"}


def by_hand_leans_on(trees: dict[str, ast.Module]) -> set[str]:
    """What the by-hand model imports beyond itself and Python's own library."""
    targets = {
        target
        for module, tree in trees.items()
        if room_of(module) == "engine.by_hand"
        for _, target in imported(module, tree, set(trees))
        if room_of(target) != "engine.by_hand"
    }
    return {target for target in targets if target.split(".")[0] not in sys.stdlib_module_names}


def test_by_hand_needs_numpy_alone():
    assert by_hand_leans_on(SOURCES) == {"numpy", "engine.errors", "engine.model.config"}
    for source in ("import jax", "from engine.model.paths import merge", "from engine.training import step"):
        assert len(by_hand_leans_on(SOURCES | {"engine.by_hand.made_up": ast.parse(source)})) == 4
    program = "import sys, engine.by_hand.generate, engine.by_hand.adamw; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_only_training_imports_optax():
    outside = {module for module in importers("optax", SOURCES) if room_of(module) not in ("engine.training", "bench")}
    assert outside == set()
    assert importers("optax", {"a": ast.parse("def f():\n    from optax.contrib import muon")}) == {"a"}


def test_only_training_takes_a_gradient():
    spoken = {
        module: mentions(tree, GRADIENTS)
        for module, tree in SOURCES.items()
        if room_of(module) not in ("engine.training", "bench")
    }
    assert {module: lines for module, lines in spoken.items() if lines} == {}
    assert mentions(SOURCES["engine.training.step"], GRADIENTS), "the step no longer differentiates?"


def test_rules_for_backward_are_written_in_the_model_alone():
    rules = {"custom_vjp", "custom_jvp", "defvjp", "defvjps", "defjvp", "custom_gradient"}
    ruled = {module for module, tree in SOURCES.items() if mentions(tree, rules)}
    assert ruled
    assert all(module.startswith("engine.model.") for module in ruled)


@pytest.mark.parametrize(
    "source", ["jax.grad(f)", "from jax import grad", "g = jax.value_and_grad", "jax.vjp(f, x)", "api.jacrev(f)"]
)
def test_the_checker_sees_a_gradient(source):
    assert len(mentions(ast.parse(source), GRADIENTS)) == 1
    assert not mentions(ast.parse("'jax.grad(f)'  # jax.grad(f)\nf.defvjp(a, b)\njax.custom_vjp(f)"), GRADIENTS)


def test_the_engine_prints_nothing():
    spoken = {module: chatter(tree) for module, tree in SOURCES.items() if module.split(".")[0] == "engine"}
    assert {module: lines for module, lines in spoken.items() if lines} == {}


@pytest.mark.parametrize(
    "source", ["print(1)", "def f():\n    print()", "sys.stdout.write('')", "import tyro", "from rich import print", "sys.argv"]
)
def test_the_checker_hears_a_print(source):
    assert chatter(ast.parse(source))


def test_inference_loads_neither_optax_nor_training():
    modules = [name for name in SOURCES if name.startswith("engine.inference.")]
    program = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
print([name for name in sys.modules if name.split(".")[0] == "optax" or name.startswith("engine.training")])
import engine.training.step
print("optax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "True"]
    assert len(modules) >= 3

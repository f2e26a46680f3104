"""The engine's own laws: one file imports flax, only training differentiates, nothing prints, by_hand needs NumPy alone."""

import ast
import fnmatch
import subprocess
import sys
import tomllib

import pytest
from source_tree import ROOT, SOURCES, Trees, imported, importers, mentions, package_of

# What differentiates, by any of JAX's names for it.
GRADIENTS = {"grad", "value_and_grad", "vjp", "jvp", "linearize", "jacrev", "jacfwd", "jacobian", "hessian"}


def console_use(tree: ast.Module) -> list[str]:
    """Where code would print to a terminal or read a command line. The pipes of another process are no terminal."""
    pipes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) != "sys"]
    piped = {f"{node.lineno}: {node.attr}" for node in pipes if node.attr in ("stdout", "stderr")}
    libraries = [name for name in imported("", tree, {}) if name in ("argparse", "tyro", "rich")]
    uses = mentions(tree, {"print", "pprint", "input", "stdout", "stderr", "argv"})
    return [line for line in uses if line not in piped] + libraries


def test_only_the_transformer_imports_flax():
    assert importers("flax", SOURCES) == {"engine.model.transformer"}


def by_hand_imports(trees: Trees) -> set[str]:
    """Lists what the by-hand model imports beyond itself and Python's own library."""
    modules = [module for module in trees if module.startswith("engine.by_hand")]
    targets = {target for module in modules for target in imported(module, trees[module], trees)}
    return {
        name for name in targets if not name.startswith("engine.by_hand") and package_of(name) not in sys.stdlib_module_names
    }


def test_by_hand_needs_numpy_alone():
    assert by_hand_imports(SOURCES) == {"numpy", "engine.errors", "engine.model.config"}
    for source in ("import jax", "from engine.model.paths import merge", "from engine.training import step"):
        assert len(by_hand_imports(SOURCES | {"engine.by_hand.made_up": ast.parse(source)})) == 4


def loaded_libraries(modules: list[str], *libraries: str) -> set[str]:
    """Which of the libraries a Python has loaded that has imported these modules."""
    imports = f"import importlib, sys; [importlib.import_module(name) for name in {modules}]"
    program = f"{imports}; print(*[name for name in {libraries} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return {*result.stdout.split()}


LIGHT = {
    "engine.by_hand*": ("jax", "tokenizers"), "engine.inference.scheduler": ("jax", "numpy", "tokenizers"),
    "stages.*.__main__": ("jax", "numpy", "tokenizers"), "engine.inference.*": ("optax", "engine.training"),
}  # fmt: skip


@pytest.mark.parametrize("names", LIGHT)
def test_loads_without(names):
    """By hand needs NumPy alone, the scheduler is plain Python, --help is there within 0.3 s, and inference does not train."""
    modules = fnmatch.filter(SOURCES, names)
    assert modules
    assert loaded_libraries(modules, *LIGHT[names]) == set()


def test_what_is_loaded_is_seen():
    libraries = {library for libraries in LIGHT.values() for library in libraries}
    assert loaded_libraries(["engine.training.step", "tokenizers"], *libraries) == libraries


def outside_training() -> Trees:
    """All modules but those of training, and of bench, which measures it."""
    return {name: tree for name, tree in SOURCES.items() if not name.startswith(("engine.training", "bench"))}


def test_only_training_imports_optax():
    assert importers("optax", outside_training()) == set()
    assert importers("optax", {"a": ast.parse("def f():\n    from optax.contrib import muon")}) == {"a"}


def test_only_training_takes_a_gradient():
    assert {module: lines for module, tree in outside_training().items() if (lines := mentions(tree, GRADIENTS))} == {}
    assert mentions(SOURCES["engine.training.step"], GRADIENTS), "the step no longer differentiates?"


def test_rules_for_backward_are_written_in_the_model_alone():
    rules = {"custom_vjp", "custom_jvp", "defvjp", "defvjps", "defjvp", "custom_gradient"}
    users = {module for module, tree in SOURCES.items() if mentions(tree, rules)}
    assert users
    assert all(module.startswith("engine.model.") for module in users)


def test_the_checker_sees_a_gradient():
    for source in ("jax.grad(f)", "from jax import grad", "g = jax.value_and_grad", "jax.vjp(f, x)", "api.jacrev(f)"):
        assert len(mentions(ast.parse(source), GRADIENTS)) == 1
    assert not mentions(ast.parse("'jax.grad(f)'  # jax.grad(f)\nf.defvjp(a, b)\njax.custom_vjp(f)"), GRADIENTS)


def test_the_engine_prints_nothing():
    engine = {module: console_use(tree) for module, tree in SOURCES.items() if package_of(module) == "engine"}
    assert {module: lines for module, lines in engine.items() if lines} == {}
    for source in ("print(1)", "def f(): print()", "sys.stdout.write('')", "import tyro", "from rich import a", "sys.argv"):
        assert console_use(ast.parse(source)), source


def test_every_room_of_the_engine_has_its_line_among_the_layers():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"].startswith("The engine from its top"))
    rooms = tuple(room for layer in layers for room in layer.split(" | "))
    packages = {"engine", "engine.mesh", "engine.model", "engine.model.cache", "engine.model.weights"}  # a docstring each
    modules = {module for module in SOURCES if package_of(module) == "engine"} - packages
    assert {module for module in modules if not f"{module}.".startswith(tuple(f"{room}." for room in rooms))} == set()

"""The project says what it needs and holds no dead code: declared libraries, functions that something but a test uses."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections import Counter

from source_tree import PACKAGES, ROOT, SOURCES, Trees, imported, package_of, read


def undeclared(trees: Trees) -> set[str]:
    """Each library that is imported and that pyproject.toml does not name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\[<>=~!;]", line)[0].strip() for lines in lists for line in lines}
    used = {package_of(target) for module, tree in trees.items() for target in imported(module, tree, trees)}
    used -= {file.stem for file in (ROOT / "bench" / "peers").iterdir()}  # scripts beside each other, run by another Python
    homes = importlib.metadata.packages_distributions()
    return {
        f"{name} is imported and not declared"
        for name in used - {*PACKAGES} - sys.stdlib_module_names
        if not declared & {*homes.get(name, ()), name.replace("_", "-"), name.replace("_", "-") + "-python"}
    }


def unused(trees: Trees) -> set[str]:
    """Each function and class that no file uses, or none but a test. Those of tests/promises count as files of the project.
    Methods of a subclass are called by its base, and a string may be a name."""
    uses: Counter[str] = Counter()
    defined: set[tuple[str, str, ast.AST]] = set()
    for module, tree in trees.items():
        nodes = list(ast.walk(tree))
        called = {child for node in nodes if isinstance(node, ast.ClassDef) and node.bases for child in node.body}
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        defined |= {(module, node.name, node) for node in nodes if isinstance(node, kinds) and node not in called}
        uses.update(use for node in nodes if (use := _used(node)))
    inside = lambda name, node: sum(_used(child) == name for child in ast.walk(node))
    named = {word for file in (ROOT / "bench").rglob("*.j2") for word in re.findall(r"\w+", file.read_text())}
    return {
        f"{module}.{name} is used by no code but tests"
        for module, name, node in defined
        if not module.startswith("tests.")
        and not name.startswith("__")
        and name not in named
        and uses[name] <= inside(name, node)
    }


def _used(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    return getattr(node, "id", None) or getattr(node, "attr", None)


def test_every_library_is_declared_and_every_function_used():
    assert sorted(undeclared(SOURCES) | unused(SOURCES | read("tests/promises"))) == []


def test_the_checker_sees_what_nobody_uses():
    trees = {
        "a": ast.parse("def f():\n    return f()\nclass C(Base):\n    def hook(self): return g()"),
        "b": ast.parse("def g(): C()"),
    }
    assert unused(trees) == {"a.f is used by no code but tests"}
    assert undeclared({"a": ast.parse("import numpy, made_up")}) == {"made_up is imported and not declared"}

"""The project's own source, parsed: what each module imports, and which names it uses."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "stages", "bench")
Trees = dict[str, ast.Module]
package_of = lambda module: module.split(".")[0]


def read(*folders: str) -> Trees:
    """{module name: syntax tree} of every Python file in these folders of the checkout."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    name = lambda file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return {name(file): ast.parse(file.read_text(), str(file)) for file in files}


@functools.cache
def import_nodes(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Returns every import statement of a module."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(module: str, tree: ast.Module, known: Trees) -> Iterator[str]:
    """Yields the modules that a module imports, also inside functions and under TYPE_CHECKING; relative ones made absolute."""
    for node in import_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            parts = module.split(".") if node.level else []
            if node.level:
                is_package = any(name.startswith(module + ".") for name in known)
                parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:  # `from package import module` names a module, `from module import thing` does not
                yield whole if (whole := f"{base}.{alias.name}") in known else base


def mentions(tree: ast.Module, names: set[str]) -> list[str]:
    """`line: name` wherever the code (not its comments or strings) uses one of the names, alone or after a dot."""
    used = {
        ast.Name: lambda node: [node.id],
        ast.Attribute: lambda node: [node.attr],
        ast.ImportFrom: lambda node: [alias.name for alias in node.names],
    }
    nodes = [node for node in ast.walk(tree) if type(node) in used]
    return [f"{node.lineno}: {name}" for node in nodes for name in used[type(node)](node) if name in names]


def importers(library: str, trees: Trees) -> set[str]:
    """The modules that import a library, or anything inside it."""
    return {
        module
        for module, tree in trees.items()
        if any(package_of(target) == library for target in imported(module, tree, trees))
    }


SOURCES = read(*PACKAGES)

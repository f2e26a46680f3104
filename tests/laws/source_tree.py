"""The project's own source, parsed: what each module imports, and which names it uses."""

import ast
import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "stages", "bench")
Trees = dict[str, ast.Module]
package_of = lambda module: module.split(".")[0]


def files(*folders: str) -> list[Path]:
    """Every file in these folders, relative to the checkout, but those that git ignores; all of them where there is no git."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return [file.relative_to(ROOT) for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in sorted({*listed}) if (ROOT / name).is_file()]


def read(*folders: str) -> Trees:
    """{module name: syntax tree} of every Python file in these folders."""
    name = lambda file: ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    return {name(file): ast.parse((ROOT / file).read_text(), str(file)) for file in files(*folders) if file.suffix == ".py"}


def imports(module: str, tree: ast.Module, known: Trees) -> Iterator[tuple[str, str]]:
    """Yields (module, name) of each import, also inside functions and under TYPE_CHECKING; the name of `import module` is "".

    Relative imports are made absolute.
    """
    for node in _import_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
            continue
        parts = module.split(".") if node.level else []
        if node.level:
            is_package = any(name.startswith(module + ".") for name in known)
            parts = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parts, *filter(None, [node.module])])
        yield from ((base, alias.name) for alias in node.names)


@functools.cache
def _import_nodes(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(module: str, tree: ast.Module, known: Trees) -> Iterator[str]:
    """Yields the modules that a module imports: of `from package import name` the name, if that is a module."""
    for base, name in imports(module, tree, known):
        yield whole if (whole := f"{base}.{name}") in known else base


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
    uses = lambda module, tree: any(package_of(target) == library for target in imported(module, tree, trees))
    return {module for module, tree in trees.items() if uses(module, tree)}


SOURCES = read(*PACKAGES)

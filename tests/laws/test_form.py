"""The project stays small, and says what it needs: lines of a file, files of a folder, bytes in all, declared libraries."""

import importlib.metadata
import re
import sys
import tomllib
from collections import Counter

from source_tree import PACKAGES, ROOT, SOURCES, Trees, imported, package_of

LINES, FILES = 400, 15  # of a file; beside each other in a folder, `__init__.py` not counted
BYTES = {"the product": 1_000_000, "the tests": 830_000}  # of Python

# Violations that are still being mended. An entry that is no longer needed fails the test, so that this can only shrink.
OPEN: set[str] = {
    "tests/storage/test_checkpoint.py has over 400 lines",
    "the product has over 1,000,000 bytes",
    "the tests has over 830,000 bytes",
}


def too_large() -> set[str]:
    """Each file of too many lines, each folder of too many files, and which half of the project weighs too much."""
    files = [file for folder in (*PACKAGES, "tests") for file in (ROOT / folder).rglob("*")]
    files = [file.relative_to(ROOT) for file in files if file.suffix in (".py", ".js", ".css", ".html")]
    beside = Counter(file.parent for file in files if file.name != "__init__.py")
    size: Counter[str] = Counter()
    for file in files:
        half = "the tests" if file.parts[0] == "tests" else "the product"
        size[half] += (ROOT / file).stat().st_size * (file.suffix == ".py")
    return {
        *(f"{file} has over {LINES} lines" for file in files if (ROOT / file).read_text().count("\n") > LINES),
        *(f"{folder}/ has over {FILES} files" for folder, count in beside.items() if count > FILES),
        *(f"{half} has over {most:,} bytes" for half, most in BYTES.items() if size[half] > most),
    }


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


def test_the_project_stays_small():
    faults = too_large() | undeclared(SOURCES)
    assert sorted(faults - OPEN) == []
    assert sorted(OPEN - faults) == [], "no longer needed in OPEN"

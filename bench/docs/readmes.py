"""Writes what READMEs take from elsewhere: the tree of each room, tables of results, pictures. `python -m bench.docs.readmes`.

A block stands between `<!-- NAME of SOURCE -->` and `<!-- end -->`. NAME is one of BLOCKS; SOURCE
is a document, such as `bench.json`, or what the block is computed from. A document is that of the
machine that `shown_machine` chooses, or of a folder that the command names: `python
-m bench.docs.readmes FOLDER`. A SOURCE with a folder, such as `tries/promises.json`, lies in RESULTS.
The line under a table names the commit and date of its document. How many commits that touch
measured files came later is printed, for it changes with each.
"""

import ast
import functools
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.cli import ROOT
from bench.docs.blocks import BLOCKS
from bench.docs.machines import RESULTS, Document, read_documents, shown_machine
from bench.sources import describe_age
from bench.stages.report import write_pictures

PICTURES = ROOT / "bench" / "pictures"
PICTURED = "bench.json"
ROOMS = ("engine", "stages", "stages/serve", "bench", "bench/plan", "tests", "tests/promises")
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ROOMS), RESULTS / "README.md"]
TREE = re.compile(r"```tree\n.*?```\n", re.DOTALL)
BLOCK = re.compile(r"(<!-- (\S+) of (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
COLUMN = 26
UNLISTED = ("__init__.py", "__pycache__", "conftest.py")  # in trees


def written(readme: Path, folder: Path | None = None) -> str:
    """Returns a README with its trees and blocks as they should be, by the documents of a machine's
    folder; by default of the one that READMEs show.
    """
    machine = folder or shown()
    text = TREE.sub(lambda _: tree(readme.parent), readme.read_text())
    return BLOCK.sub(lambda match: match[1] + block(match[2], match[3], machine) + match[4], text)


@functools.cache
def shown() -> Path:
    """Returns the folder of the machine that READMEs show."""
    sources: set[str] = set()
    for readme in READMES:
        sources.update(source for _, _, source, _ in BLOCK.findall(readme.read_text()))
    return shown_machine({source for source in sources if source.endswith(".json") and "/" not in source})


def sh_commands(readme: Path) -> list[list[str]]:
    """Lists what follows `python` in each line of a README's sh blocks."""
    commands = []
    for block in re.findall(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL):
        for line in block.splitlines():
            if " python " in line:
                words = shlex.split(line, comments=True)
                commands.append(words[words.index("python") + 1 :])
    return commands


def tree(room: Path) -> str:
    """Returns a line for each file in Python or C of a room: its name and what it opens with. A
    room in it has its own.
    """
    return "```tree\n" + "".join(f"{line}\n" for line in _lines(room, room, 0)) + "```\n"


def _lines(folder: Path, room: Path, depth: int) -> Iterator[str]:
    for path in _listed(folder):
        start = f"{'  ' * depth}{path.name}"
        if path.is_dir():
            start += "/"
        yield f"{start:<{COLUMN}} {_opening(path)}".rstrip()
        if path.is_dir() and str(path.relative_to(ROOT)) not in ROOMS:
            yield from _lines(path, room, depth + 1)


def _listed(folder: Path) -> list[Path]:
    """Returns what a tree names of a folder: its files, and then its folders, that hold code."""
    files = sorted([*folder.glob("*.py"), *folder.glob("*.[ch]")])
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and any(path.rglob("*.py"))]
    return [path for path in (*files, *inner) if path.name not in UNLISTED]


def _opening(path: Path) -> str:
    """Returns the first sentence of a file, or of a package's; empty for a folder that is no package."""
    if path.suffix in (".c", ".h"):
        (sentence,) = re.findall(r"\A// (.*?)[.:]\s", path.read_text())
        return f"{sentence}."
    module = path
    if path.is_dir():
        module = path / "__init__.py"
    if not module.exists():
        return ""
    docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
    return docstring.partition("\n")[0]


def block(name: str, source: str, machine: Path) -> str:
    """Returns the text of a block, or a sentence when the machine has no such document yet."""
    path = machine / source
    if "/" in source:
        path = RESULTS / source
    document: Document = {}
    if path.suffix == ".json":
        if not path.exists():
            return f"`{source}` is still to be measured.\n"
        document = json.loads(path.read_text())
    return "".join(f"{line}\n" for line in BLOCKS[name](document))


if __name__ == "__main__":
    machine = shown()
    if sys.argv[1:]:
        machine = Path(sys.argv[1])
    for file, document in read_documents(machine).items():
        print(f"{file}: {describe_age(document)}")
    for readme in READMES:
        readme.write_text(written(readme, machine))
    write_pictures(PICTURES, json.loads((machine / PICTURED).read_text()))

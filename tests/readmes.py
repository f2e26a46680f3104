"""Writes what READMEs take from elsewhere: the tree of each room, and tables of results. `python tests/readmes.py`."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.format import money, si, times

ROOT = Path(__file__).parent.parent
ROOMS = ("engine", "stages", "stages/serve", "bench", "bench/plan", "tests/promises")
READMES = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ROOMS)]
TREE = re.compile(r"```tree\n.*?```\n", re.DOTALL)
TABLE = re.compile(r"(<!-- (\S+) of (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
COLUMN = 26
# Rows of the stage table, by name, and as the first table of the README calls them: their passes, and the weights that change.
SUMMARY = {
    "pre-training step": ("training", "forward and backward", "all"),
    "LoRA rank 8 on q and v": ("fine-tuning with LoRA", "forward, and backward to the adapters", "the adapters"),
    "evaluation forward": ("inference", "forward", "none"),
}
EXCERPT = (
    "pre-training step", "bottom half frozen", "LoRA rank 8 on q and v", "evaluation forward", "prefix-cache hit",
    "decode alone", "decode with 8 slots", "decode with 32 slots",
)  # fmt: skip


def written(readme: Path) -> str:
    """Returns a README with its trees and tables as they should be."""
    text = TREE.sub(lambda _: tree(readme.parent), readme.read_text())
    return TABLE.sub(lambda match: match[1] + table(match[2], json.loads((ROOT / match[3]).read_text())) + match[4], text)


def tree(room: Path) -> str:
    """Returns a line for each Python file of a room: its name and what its docstring opens with. A room in it has its own."""
    return "```tree\n" + "".join(f"{line}\n" for line in _lines(room, room, 0)) + "```\n"


def _lines(folder: Path, room: Path, depth: int) -> Iterator[str]:
    inner = [path for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))]
    for path in sorted([*folder.glob("*.py"), *inner], key=lambda path: (path.is_dir(), path.name)):
        if path.name in ("__init__.py", "__pycache__", "conftest.py"):
            continue
        start = f"{'  ' * depth}{path.name}{'/' * path.is_dir()}"
        module = path / "__init__.py" if path.is_dir() else path
        opening = ast.get_docstring(ast.parse(module.read_text())) if module.exists() else None
        yield f"{start:<{COLUMN}} {(opening or '').partition(chr(10))[0]}".rstrip()
        if path.is_dir() and str(path.relative_to(ROOT)) not in ROOMS:
            yield from _lines(path, room, depth + 1)


def table(name: str, document: dict[str, Any]) -> str:
    """Returns a table of the stage table's document: `summary`, `excerpt` or `stages`, which has every row."""
    rows = {row["name"]: row for row in document["rows"]}
    if name == "summary":
        lines = ["| | passes | weights that change | operations | time |", "|---|---|---|---:|---:|"]
        for row, words in SUMMARY.items():
            lines.append("| " + " | ".join([*words, *_ratios(rows[row])]) + " |")
    else:
        lines = [
            "| | weights | operations | time | time a token | peak | $ a million tokens |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for row in EXCERPT if name == "excerpt" else rows:
            each = rows[row]
            cost = si(each["seconds_per_token"], "s"), si(each["peak_bytes"], "B"), money(each["usd_per_million_tokens"])
            lines.append("| " + " | ".join([row, each["weights"], *_ratios(each), *cost]) + " |")
    return "\n".join(lines) + "\n"


def _ratios(row: dict[str, Any]) -> tuple[str, str]:
    return times(row["flop_ratio_to_forward"]), times(row["time_ratio_to_forward"])


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(written(readme))

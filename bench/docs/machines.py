"""The folders of machines in bench/results, and which of them READMEs show."""

from collections.abc import Collection
from pathlib import Path

from bench.cli import ROOT
from bench.sitting import read_documents

RESULTS = ROOT / "bench" / "results"
TRIES = RESULTS / "tries"  # of no machine


def machines(results: Path = RESULTS) -> list[Path]:
    """Returns the folder of each machine, by name."""
    folders = {path.parent for path in results.glob("*/*.json")}
    return sorted(folders - {TRIES})


def shown_machine(names: Collection[str], results: Path = RESULTS) -> Path:
    """Returns the newest folder that has every document of `names`; where none has, the newest of
    those that lack the fewest. A folder is as old as its oldest document.
    """

    def rank(folder: Path) -> tuple[int, str]:
        documents = read_documents(folder)
        there = sum(name in documents for name in names)
        return there, min(document["date"] for document in documents.values())

    return max(machines(results), key=rank)

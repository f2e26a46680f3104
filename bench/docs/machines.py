"""The folders of machines in bench/results, and which of them READMEs show."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bench.sources import ROOT

Document = dict[str, Any]

RESULTS = ROOT / "bench" / "results"
TRIES = RESULTS / "tries"  # of no machine
# What a complete folder may lack: these take longer than the hour of bench.everything.
OPTIONAL = ("peers-sizes.json", "peers-mistral.json")


def read_documents(folder: Path) -> dict[str, Document]:
    """Returns the documents of a folder by the names of their files."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def machines(results: Path = RESULTS) -> list[Path]:
    """Returns the folder of each machine, by name."""
    folders = {path.parent for path in results.glob("*/*.json")}
    return sorted(folders - {TRIES})


def shown_machine(names: Collection[str], results: Path = RESULTS) -> Path:
    """Returns the newest folder that has every document of `names` but OPTIONAL; where none has, the
    newest of those that lack the fewest. A folder is as old as its oldest document.
    """
    required = {*names} - {*OPTIONAL}

    def rank(folder: Path) -> tuple[int, str]:
        documents = read_documents(folder)
        there = [document for file, document in documents.items() if file in required]
        return len(there), min((document["date"] for document in there), default="")

    return max(machines(results), key=rank)

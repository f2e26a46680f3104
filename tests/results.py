"""The results of machines: whose folder READMEs take, and in what the documents of one folder differ."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

Document = dict[str, Any]

RESULTS = Path(__file__).parent.parent / "bench" / "results"
TRIES = RESULTS / "tries"  # of no machine
MACHINE = ("processor", "model_numbers", "instructions", "cores")  # that all documents of a machine share
# How far a machine's ceilings may lie apart, the highest over the lowest. Who shares a machine reads
# its memory too: on one of two cores that rate went from 26 to 35 GB/s and back within an hour, while
# products stayed within 8%.
SPREAD = {"bf16_gflops": 1.1, "f32_gflops": 1.1, "int8_gflops": 1.1, "read_gbs": 1.5}
MOST_OF_OTHERS = 0.1  # of the cores' time


def machines(results: Path = RESULTS) -> list[Path]:
    """Returns the folder of each machine, by name."""
    folders = {path.parent for path in results.glob("*/*.json")}
    return sorted(folders - {TRIES})


def read_documents(folder: Path) -> dict[str, Document]:
    """Returns the documents of a folder by the names of their files."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def shown_machine(names: Collection[str], results: Path = RESULTS) -> Path:
    """Returns the newest folder that has every document of `names`; where none has, the newest of
    those that lack the fewest. A folder is as old as its oldest document.
    """

    def rank(folder: Path) -> tuple[int, str]:
        documents = read_documents(folder)
        there = sum(name in documents for name in names)
        return there, min(document["date"] for document in documents.values())

    return max(machines(results), key=rank)


def differences(documents: dict[str, Document]) -> list[str]:
    """Returns a line for each thing that the documents of a machine should share, and do not:
    commit, versions, processor, ceilings within SPREAD; and for each that others disturbed.
    """
    facts = {name: _shared_facts(document) for name, document in documents.items()}
    every_fact = sorted({fact for of_document in facts.values() for fact in of_document})
    lines = []
    for fact in every_fact:
        values = {name: of_document[fact] for name, of_document in facts.items() if fact in of_document}
        if len({*values.values()}) > 1:
            lines.append(f"{fact}: {', '.join(f'{value} in {name}' for name, value in values.items())}")
    for name, document in documents.items():
        commit = document["commit"]
        if not commit or commit.endswith("-dirty"):
            lines.append(f"commit: {name} is of none")
        if not {"reached_before", "reached_after"} <= document["machine"].keys():
            lines.append(f"ceilings: {name} has none")
        others = document["machine"].get("taken_by_others") or 0.0
        if others > MOST_OF_OTHERS:
            lines.append(f"others: they took {others:.0%} of the cores' time in {name}")
    for rate, spread in SPREAD.items():
        reached = {name: _ceiling(document, rate) for name, document in documents.items()}
        known = {name: value for name, value in reached.items() if value is not None}
        if not known:
            continue
        slowest = min(known, key=known.__getitem__)
        fastest = max(known, key=known.__getitem__)
        if known[fastest] > spread * known[slowest]:
            lines.append(f"{rate}: {known[slowest]:.0f} in {slowest}, {known[fastest]:.0f} in {fastest}")
    return lines


def _shared_facts(document: Document) -> dict[str, str]:
    facts = {"commit": str(document["commit"])}
    for library, version in document["versions"].items():
        facts[f"version of {library}"] = str(version)
    for key in MACHINE:
        facts[key] = str(document["machine"].get(key))
    return facts


def _ceiling(document: Document, rate: str) -> float | None:
    """Returns the better of the rates before and after, as a ceiling is the best that was seen."""
    machine = document["machine"]
    moments = [machine.get("reached_before"), machine.get("reached_after")]
    rates = [reached[rate] for reached in moments if reached]
    return max(rates, default=None)

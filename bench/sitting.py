"""In what the documents of a machine differ that are of one sitting, and which of them to measure again."""

import json
from pathlib import Path
from typing import Any

Document = dict[str, Any]

MACHINE = ("processor", "model_numbers", "instructions", "cores")  # that all documents of a machine share
RATES = ("bf16_gflops", "f32_gflops", "int8_gflops", "read_gbs")
SPREAD = 1.1  # within which a machine's rates lie in all documents, the highest over the lowest
MOST_OF_OTHERS = 0.1  # of the cores' time


def read_documents(folder: Path) -> dict[str, Document]:
    """Returns the documents of a folder by the names of their files."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def differences(documents: dict[str, Document]) -> list[str]:
    """Returns a line for each thing that the documents of a machine should share, and do not:
    commit, versions, processor, rates within SPREAD; and for each that others disturbed.
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
        if _is_disturbed(document):
            others = document["machine"]["taken_by_others"]
            lines.append(f"others: they took {others:.0%} of the cores' time in {name}")
    for rate in RATES:
        known = _rates(documents, rate)
        if not known:
            continue
        slowest = min(known, key=known.__getitem__)
        fastest = max(known, key=known.__getitem__)
        if known[fastest] > SPREAD * known[slowest]:
            lines.append(f"{rate}: {known[slowest]:.0f} in {slowest}, {known[fastest]:.0f} in {fastest}")
    return lines


def to_measure_again(documents: dict[str, Document]) -> set[str]:
    """Returns the names of the documents that others disturbed, and of those of another speed than
    most: whose rates lie outside the range, as wide as SPREAD allows, that holds the most documents.
    """
    names = {name for name, document in documents.items() if _is_disturbed(document)}
    for rate in RATES:
        known = _rates(documents, rate)
        most: set[str] = set()
        for lowest in sorted(known.values(), reverse=True):
            within = {name for name, value in known.items() if lowest <= value <= SPREAD * lowest}
            if len(within) > len(most):
                most = within
        names |= known.keys() - most
    return names


def _is_disturbed(document: Document) -> bool:
    return (document["machine"].get("taken_by_others") or 0.0) > MOST_OF_OTHERS


def _rates(documents: dict[str, Document], rate: str) -> dict[str, float]:
    """Returns what the machine reached of a rate, of each document that says it."""
    reached = {name: _lower(document, rate) for name, document in documents.items()}
    return {name: value for name, value in reached.items() if value is not None}


def _shared_facts(document: Document) -> dict[str, str]:
    facts = {"commit": str(document["commit"])}
    for library, version in document["versions"].items():
        facts[f"version of {library}"] = str(version)
    for key in MACHINE:
        facts[key] = str(document["machine"].get(key))
    return facts


def _lower(document: Document, rate: str) -> float | None:
    """Returns the lower of a rate before and after, each the best of some processes.

    It is what the machine reached at both ends. The better of the two tells of luck: where a process's
    memory lies well it reads at 60 GB/s, as one in six did here, and the others at 35.
    """
    machine = document["machine"]
    moments = [machine.get("reached_before"), machine.get("reached_after")]
    rates = [reached[rate] for reached in moments if reached]
    return min(rates, default=None)

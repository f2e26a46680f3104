"""Compares two results row by row: the ratios that both measured, their intervals, and whether one has moved.

    python -m bench.step --out before    measures, and keeps the document as before/step.json; --out for any measurement
    python -m bench compare before/step.json after/step.json

A result of another hour is not paired with this one, so seconds are not compared. What is compared
are ratios of calls that ran in the same rounds of one result: those of all its rounds with those of
all the other's. A row has moved where the interval of one over the other does not hold 1. The exit
code is 1 where a row has moved.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from bench.machine import Json
from bench.terminal import print_table
from engine.errors import UserError
from engine.format import join_words

MACHINE = ("processor", "model_numbers", "instructions", "cores", "device")
# that together tell a row from the others of its list
ROW_KEYS = ("name", "part", "model", "format", "shape", "peer")
UNMEASURED = ("out", "json", "peer_python")  # flags that change nothing that is measured


@dataclasses.dataclass(frozen=True)
class CompareFlags:
    before: tyro.conf.Positional[Path]
    """A result: NAME.json in the folder of --out."""
    after: tyro.conf.Positional[Path]
    """Another of the same measurement."""
    any_machine: bool = False
    """Compare results of different machines too."""
    any_flags: bool = False
    """Compare results of different models or flags too."""


def compare(flags: CompareFlags) -> Json:
    """Prints and returns the rows that both results have. Raises UserError for results that cannot
    be compared.
    """
    document_before = read_result(flags.before)
    document_after = read_result(flags.after)
    both = f"{flags.before} and {flags.after}"
    machines = different_machines(document_before["machine"], document_after["machine"])
    if machines and not flags.any_machine:
        raise UserError(f"{both} are of different machines: {', '.join(machines)}. Give --any-machine.")
    settings = different_settings(document_before, document_after)
    if settings and not flags.any_flags:
        raise UserError(f"{both} were measured with another {join_words(settings)}. Give --any-flags.")
    before = dict(find_ratios(document_before))
    after = dict(find_ratios(document_after))
    for path, ratios in ((flags.before, before), (flags.after, after)):
        if not ratios:
            raise UserError(
                f"{path} keeps no ratios of single rounds, by which results are compared: measure it again."
            )
    rows = [compare_ratios(name, before[name], after[name]) for name in before if name in after]
    alone = [name for name in (*before, *after) if (name in before) != (name in after)]
    if alone:
        print(f"only in one of them: {'; '.join(alone)}")
    if not rows:
        raise UserError(f"{both} have no measured ratio in common.")
    print_table(
        f"{document_after['date']} against {document_before['date']}",
        ("", "before", "after", "after over before", ""),
        [(row["name"], row["before"], row["after"], row["words"], row["verdict"]) for row in rows],
    )
    return {"rows": rows}


def different_machines(before: Json, after: Json) -> list[str]:
    """Returns in words what of MACHINE differs between two machines."""
    words = []
    for name in MACHINE:
        if before.get(name) != after.get(name):
            words.append(f"{name} {before.get(name)} and {after.get(name)}")
    return words


def different_settings(before: Json, after: Json) -> list[str]:
    """Returns the names of the flags, and `model`, that differ between two documents and change what is
    measured.
    """
    settings_before = {"model": before.get("model"), **before.get("flags", {})}
    settings_after = {"model": after.get("model"), **after.get("flags", {})}
    names = [name for name in settings_before | settings_after if name not in UNMEASURED]
    return [name for name in names if settings_before.get(name) != settings_after.get(name)]


def read_result(path: Path) -> Json:
    """Returns a result's document. Raises UserError when it is none."""
    from engine.untrusted import read_json_object

    document = read_json_object(path)
    if not isinstance(document.get("machine"), dict) or "date" not in document:
        raise UserError(
            f"{path} is no result: python -m bench, or a measurement "
            "that it lists, writes one with --out FOLDER."
        )
    return document


def find_ratios(value: Any, name: str = "") -> Iterator[tuple[str, Sequence[float]]]:
    """Yields the name and the rounds' ratios of each ratio in a document that has them; a name says
    where it stands there.
    """
    if isinstance(value, dict):
        if value.get("round_ratios"):
            yield name, value["round_ratios"]
        for key, each in value.items():
            if key == "claims":  # judge ratios of the rows once more
                continue
            if key == "rows":
                yield from find_ratios(each, name)
            else:
                yield from find_ratios(each, f"{name}, {key}".removeprefix(", "))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            if isinstance(each, dict):
                keys = [key for key in ROW_KEYS if key in each]
            else:
                keys = []
            own = ", ".join(str(each[key]) for key in keys) or number
            yield from find_ratios(each, f"{name}, {own}".removeprefix(", "))


def compare_ratios(name: str, before: Sequence[float], after: Sequence[float]) -> Json:
    """Returns the row of one ratio before and after: how many times larger it is, and whether it
    has moved.
    """
    from bench.timing import compare_rounds, median_ratio  # imports JAX, as --help need not

    over = compare_rounds(before, after)
    is_larger = over.exceeds(1)
    if is_larger is None:
        verdict = "undecided"
    elif is_larger:
        verdict = "larger"
    else:
        verdict = "smaller"
    return {
        "name": name,
        **over._asdict(),
        "before": str(median_ratio(before)),
        "after": str(median_ratio(after)),
        "words": str(over),
        "verdict": verdict,
        "met": is_larger is None,
    }

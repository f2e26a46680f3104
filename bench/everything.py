"""Measures all documents of a machine in one sitting, of one commit; goes on where it was stopped.

    python -m bench.everything --folder bench/results/NAME --peer-python peers/bin/python    about two quiet hours

A document of this commit and these versions that is there already is kept. One that others
disturbed, or that was measured at another speed of the machine than most, is measured again, AGAIN
times at most. READMEs and their pictures are written last.

A process is a few hundredths faster or slower than the next of the same program, in all of its
rounds. Where processes differ by 2%, nine rounds of one say of every fourth pair of equal programs
that one is faster, of three processes of every eleventh, and of nine of every twenty-fifth
(tests/bench/test_timing.py). So each round of a training step is of a process of its own; a row of
serving, whose prompts take minutes to prepare, is of three processes of three rounds.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.cli import ROOT, circumstances, run_bench
from bench.machine import Json, Watch
from bench.sitting import differences, read_documents, to_measure_again
from bench.terminal import progress
from engine.errors import UserError
from engine.files import write_text


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A document by its name in the folder, and the command that makes it."""

    name: str
    words: tuple[str, ...]  # after `python -m`
    processes: int = 1  # whose rounds are taken together
    has_peer: bool = False  # whether --peer-python is for it
    drop: tuple[str, ...] = ()  # keys that are not kept: a recording takes megabytes
    repeats: str = ""  # the document whose claim it repeats: it is measured after that one, always


AGAIN = 3  # times at most that a document is measured again
ONE_ROUND = ("--rounds", "1")  # of each of nine processes
THREE_ROUNDS = ("--rounds", "3")  # of each of three
MEASUREMENTS = (
    Measurement("documents", ("bench.documents",)),
    Measurement("bench", ("bench",), repeats="documents"),
    Measurement("step", ("bench.step", *ONE_ROUND), processes=9),
    Measurement(
        "step-finetuning",
        ("bench.step", "--of", "finetuning", "--shapes", "8x768x256x1", *ONE_ROUND),
        processes=9,
    ),
    Measurement("step-saving", ("bench.step", "--of", "saving")),
    Measurement("peers", ("bench.peers", *ONE_ROUND), processes=9, has_peer=True),
    Measurement(
        "peers-serving", ("bench.peers", "--of", "serving", *THREE_ROUNDS), processes=3, has_peer=True
    ),
    Measurement("peers-losses", ("bench.peers", "--of", "losses"), has_peer=True),
    Measurement("serving", ("bench.serving",)),
    Measurement("commands", ("bench.commands",)),
    Measurement("commands-resuming", ("bench.commands", "--of", "resuming")),
    Measurement("lives", ("bench.lives",), drop=("lives",)),
    Measurement("peers-sizes", ("bench.peers", "--of", "sizes", *THREE_ROUNDS), processes=3, has_peer=True),
    Measurement(
        "peers-mistral", ("bench.peers", "--of", "mistral", *THREE_ROUNDS), processes=3, has_peer=True
    ),
)
# what the README's commands print, and READMEs with their pictures
LAST = ("bench.docs.transcript", "bench.docs.readmes")


@dataclasses.dataclass(frozen=True)
class EverythingFlags:
    """Where the documents lie, and where the peers live."""

    folder: Path
    """The machine's folder in bench/results."""
    peer_python: Path | None = None
    """The Python that has the peers, when it is not this one."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: all)")] = ()
    """Measure these documents alone, such as `step`, and write no README."""


def measure_everything(flags: EverythingFlags) -> Json:
    """Measures what the folder lacks, and returns each document's name and command.

    Raises UserError for sources that are of no commit, and for a name that is no document's.
    """
    about = circumstances(["bench.everything"], flags)
    if not about["commit"] or about["commit"].endswith("-dirty"):
        raise UserError(
            "The sources are not those of a commit, which all documents name: "
            "commit or stash what has changed."
        )
    names = [measurement.name for measurement in MEASUREMENTS]
    unknown = [name for name in flags.only if name not in names]
    if unknown:
        raise UserError(f"--only {unknown[0]} is no document's name: {', '.join(names)}.")
    measurements = list(MEASUREMENTS)
    if flags.only:
        measurements = [measurement for measurement in MEASUREMENTS if measurement.name in flags.only]
    flags.folder.mkdir(parents=True, exist_ok=True)
    lacking = set()
    for measurement in measurements:
        path = _path_of(measurement, flags.folder)
        if not is_current(path, about):
            lacking.add(path.name)
    wanted = with_repeating(measurements, lacking)
    for measurement in measurements:
        if measurement not in wanted:
            progress(f"kept: {_path_of(measurement, flags.folder)}")
    _measure(wanted, flags)
    for _ in range(AGAIN):
        apart = to_measure_again(_read_there(measurements, flags.folder))
        if not apart:
            break
        progress(
            f"again, for others disturbed it or the machine had another speed: {', '.join(sorted(apart))}"
        )
        _measure(with_repeating(measurements, apart), flags)
    if not flags.only:
        for script in LAST:
            progress(f"writing: python -m {script}")
            subprocess.run([sys.executable, "-m", script, str(flags.folder)], cwd=ROOT, check=True)
    for line in differences(_read_there(measurements, flags.folder)):
        progress(f"not of one sitting: {line}")
    return {"documents": [dataclasses.asdict(measurement) for measurement in measurements]}


def with_repeating(measurements: Sequence[Measurement], files: Collection[str]) -> list[Measurement]:
    """Returns the measurements of these files, and those that repeat a claim of one of them."""
    wanted = []
    for measurement in measurements:
        names = {f"{name}.json" for name in (measurement.name, measurement.repeats)}
        if not names.isdisjoint(files):
            wanted.append(measurement)
    return wanted


def _path_of(measurement: Measurement, folder: Path) -> Path:
    return folder / f"{measurement.name}.json"


def _read_there(measurements: Sequence[Measurement], folder: Path) -> dict[str, Json]:
    """Returns the documents of `measurements` by the names of their files."""
    names = {_path_of(measurement, folder).name for measurement in measurements}
    there = read_documents(folder)
    return {name: document for name, document in there.items() if name in names}


def _measure(measurements: Sequence[Measurement], flags: EverythingFlags) -> None:
    """Writes these documents. Raises UserError, when all others are made, for those that failed."""
    failures = []  # the names of documents
    for measurement in measurements:
        progress(f"measuring: python -m {' '.join(measurement.words)}")
        try:
            measure_document(measurement, _path_of(measurement, flags.folder), flags.peer_python)
        except UserError as error:
            progress(f"failed: {error}")
            failures.append(measurement.name)
    if failures:
        raise UserError(
            f"{', '.join(failures)} failed, for the reasons above; the same command goes on with them."
        )


def is_current(path: Path, about: Json) -> bool:
    """Whether a document is there, and of the same commit and versions."""
    from engine.untrusted import read_json_object

    if not path.exists():
        return False
    document = read_json_object(path)
    return all(document.get(key) == about[key] for key in ("commit", "versions"))


def measure_document(measurement: Measurement, path: Path, peer_python: Path | None) -> None:
    """Measures a document by its processes, one after the other, and writes it. Raises UserError
    when one fails.
    """
    words = [*measurement.words, "--json"]
    if measurement.has_peer and peer_python:
        words += ["--peer-python", str(peer_python)]
    watch = Watch()
    documents = []
    for number in range(measurement.processes):
        if measurement.processes > 1:
            progress(f"process {number + 1} of {measurement.processes}")
        documents.append(_run(words, path.parent))
    document = pool(documents)
    for key in measurement.drop:
        del document[key]
    document["machine"] |= watch.finish()
    document["processes"] = measurement.processes
    write_text(path, f"{json.dumps(document)}\n")


def _run(words: Sequence[str], folder: Path) -> Json:
    """Runs a measurement and returns its document. A missed bar is no failure."""
    if words[0] == "bench":  # takes the claim of the documents beside it, and writes its page there
        words = [*words, "--out", str(folder)]
    command = [sys.executable, "-m", *words]
    result = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode not in (0, 1) or not result.stdout.strip():
        raise UserError(f"python -m {' '.join(words)} ended with {result.returncode}.")
    return json.loads(result.stdout)


def pool(documents: Sequence[Any]) -> Any:
    """Returns one document of several of the same measurement.

    A ratio is of the rounds of all, with its interval and verdict; a peer's settings are those of
    all; another float is the median, and anything else, an integer too, the first's.
    What a process has not measured (None) is of the others.
    """
    from bench.timing import Ratio, median_ratio

    documents = [document for document in documents if document is not None]
    if not documents:
        return None
    first = documents[0]
    if isinstance(first, dict):
        pooled = {key: pool([document[key] for document in documents if key in document]) for key in first}
        rounds: list[float] = []
        for document in documents:
            rounds += document.get("round_ratios") or ()
        if rounds:
            pooled |= median_ratio(rounds)._asdict()
            if pooled.get("bar"):
                pooled["met"] = Ratio.of(pooled).exceeds(pooled["bar"])
        if "same" in first:
            pooled["same"] = all(document["same"] for document in documents)
        if "peer_settings" in first:
            pooled["peer_settings"] = _different_settings(documents)
        return pooled
    if isinstance(first, list) and all(len(each) == len(first) for each in documents):
        return [pool(each) for each in zip(*documents, strict=True)]
    if all(isinstance(each, float) for each in documents):
        return statistics.median(documents)
    return first


def _different_settings(documents: Sequence[Json]) -> list[Json]:
    """Returns each setting that a peer chose, once, in the order in which they came."""
    settings = []
    for document in documents:
        for setting in document["peer_settings"]:
            if setting not in settings:
                settings.append(setting)
    return settings


if __name__ == "__main__":
    sys.exit(run_bench("bench.everything", __doc__, EverythingFlags, measure_everything))

"""Measures all documents of a machine within an hour; goes on where it was stopped, at any commit.

    python -m bench.everything --folder bench/results/NAME --peer-python peers/bin/python    at most an hour on two cores
    python -m bench.everything --folder bench/results/NAME --again step                      a current document, once more
    python -m bench.everything --folder bench/results/NAME --only peers-sizes                what takes longer

A document is current while the measured sources, the versions and the processor are those here. A
current one is not measured again, whoever disturbed it. Each is written as soon as it is made.

Each has a budget of seconds. At 0.6 of it no rounds are added, nor processes that would end later,
beyond the six rounds of a verdict. At twice the budget a measurement is killed, or earlier where
those after it would lack their budgets: its document stays as it was, and the rest goes on. READMEs
and their pictures are written last.

A process is a few hundredths faster or slower than the next of the same program, in all of its
rounds. Where processes differ by 2%, nine rounds of one say of every fourth pair of equal programs
that one is faster, of three processes of every eleventh, and of nine of every twenty-fifth
(tests/bench/test_timing.py). So the rounds of a training step are of three processes or more; a
row of serving, whose prompts take minutes to prepare, is of one.
"""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.cli import ROOT, circumstances, run_bench
from bench.docs.machines import OPTIONAL, read_documents
from bench.machine import Json, Watch, is_same_processor
from bench.sources import describe_age, describe_origin
from bench.terminal import progress
from engine.errors import UserError
from engine.files import write_text


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A document by its name in the folder, and the command that makes it."""

    name: str
    words: tuple[str, ...]  # after `python -m`
    budget: float  # seconds, with the machine's rates before and after
    processes: int = 1  # at most, whose rounds are pooled
    rounds: int | None = None  # of each process; None: as the command has it by default
    has_peer: bool = False  # whether --peer-python is for it
    drop: tuple[str, ...] = ()  # keys that are not kept: a recording takes megabytes

    @property
    def file(self) -> str:
        return f"{self.name}.json"


HOUR = 3600.0
MIN_ROUNDS = 6  # as bench.timing has it, which imports JAX
ROUNDS_SHARE = 0.6  # of a budget, after which no rounds are added: what follows them takes time too
KILLED_AT = 2.0  # budgets
RATES_SECONDS = 15.0  # of measuring the machine's rates after a document
WRITING_SECONDS = 60.0  # of READMEs and pictures
# Those whose time varies least come first: what they leave of the hour is for the last ones.
MEASUREMENTS = (
    Measurement("step", ("bench.step",), 270, processes=5, rounds=2),
    Measurement(
        "step-finetuning",
        ("bench.step", "--of", "finetuning", "--shapes", "8x768x256x1"),
        180,
        processes=5,
        rounds=2,
    ),
    Measurement("step-saving", ("bench.step", "--of", "saving"), 120),
    Measurement("commands", ("bench.commands",), 270),
    Measurement("commands-resuming", ("bench.commands", "--of", "resuming"), 90),
    Measurement("lives", ("bench.lives",), 240, drop=("lives",)),
    Measurement("serving", ("bench.serving",), 210),
    Measurement("documents", ("bench.documents",), 420),
    # after `documents`, whose claim its table repeats
    Measurement("bench", ("bench", "--max-time", "90"), 210),
    Measurement("peers", ("bench.peers",), 330, processes=5, rounds=2, has_peer=True),
    Measurement("peers-losses", ("bench.peers", "--of", "losses"), 120, has_peer=True),
    Measurement("peers-serving", ("bench.peers", "--of", "serving", "--new", "33"), 570, has_peer=True),
    Measurement("transcript", ("bench.docs.transcript",), 510),
    # these take longer, and are made by --only alone
    Measurement("peers-sizes", ("bench.peers", "--of", "sizes"), 2700, processes=3, rounds=3, has_peer=True),
    Measurement(
        "peers-mistral", ("bench.peers", "--of", "mistral"), 900, processes=3, rounds=3, has_peer=True
    ),
)


@dataclasses.dataclass(frozen=True)
class EverythingFlags:
    """Where the documents lie, and where the peers live."""

    folder: Path
    """The processor's folder in bench/results."""
    peer_python: Path | None = None
    """The Python that has the peers, when it is not this one."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: all)")] = ()
    """Measure these documents alone, such as `step`, and write no README."""
    again: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    """Measure these documents even if they are current."""


def measure_everything(flags: EverythingFlags) -> Json:
    """Measures the documents that are not current, and returns each document's name and command.

    Raises UserError for a name that no document has, for a folder of another processor, and, when all
    others are made, for the documents that failed.
    """
    end = time.monotonic() + HOUR
    about = circumstances(["bench.everything"], flags)
    measurements = choose_measurements(flags)
    flags.folder.mkdir(parents=True, exist_ok=True)
    documents = read_documents(flags.folder)
    check_processor(documents, about, flags.folder)
    lacking = []
    for measurement in measurements:
        document = documents.get(measurement.file)
        state = "to measure"
        if document:
            state = f"to measure; there is one {describe_age(document)}"
        if document and is_current(document, about):
            state = f"current, {describe_origin(document)}"
        if measurement.name in flags.again or not state.startswith("current"):
            lacking.append(measurement)
        progress(f"{measurement.name}: {state}")
    if lacking:
        print_budgets(lacking)
        end = max(end, end - HOUR + sum_budgets(lacking))  # of those that take longer than the hour
        failures = measure_all(lacking, flags, end)
        if not flags.only:
            write_readmes(end)
        if failures:
            raise UserError(
                f"{', '.join(failures)} failed, for the reasons above; the same command goes on with them."
            )
    return {"documents": [dataclasses.asdict(measurement) for measurement in measurements]}


def choose_measurements(flags: EverythingFlags) -> list[Measurement]:
    """Returns the measurements of --only, or those of the hour. Raises UserError for an unknown name."""
    names = [measurement.name for measurement in MEASUREMENTS]
    for flag, chosen in (("--only", flags.only), ("--again", flags.again)):
        for name in chosen:
            if name not in names:
                raise UserError(f"{flag} {name} is no document's name: {', '.join(names)}.")
    if flags.only:
        return [measurement for measurement in MEASUREMENTS if measurement.name in flags.only]
    return [measurement for measurement in MEASUREMENTS if measurement.file not in OPTIONAL]


def check_processor(documents: dict[str, Json], about: Json, folder: Path) -> None:
    """Raises UserError where a folder has a document of another processor than this one."""
    for file, document in documents.items():
        if not is_same_processor(document["machine"], about["machine"]):
            raise UserError(
                f"{file} in {folder} is of another processor, {document['machine']['processor']} with "
                f"{document['machine']['cores']} cores: choose another folder."
            )


def is_current(document: Json, about: Json) -> bool:
    """Whether a document is of the measured sources, versions and processor of `about`."""
    return (
        document.get("sources") == about["sources"]
        and document["versions"] == about["versions"]
        and is_same_processor(document["machine"], about["machine"])
    )


def print_budgets(measurements: Sequence[Measurement]) -> None:
    """Prints the seconds of each measurement, and their sum."""
    for measurement in measurements:
        progress(f"{measurement.budget:6.0f} s  {measurement.name}")
    progress(f"{WRITING_SECONDS:6.0f} s  READMEs and pictures")
    progress(f"{sum_budgets(measurements):6.0f} s  in all")


def sum_budgets(measurements: Sequence[Measurement]) -> float:
    return sum(measurement.budget for measurement in measurements) + WRITING_SECONDS


def measure_all(measurements: Sequence[Measurement], flags: EverythingFlags, end: float) -> list[str]:
    """Writes these documents before `end`, on the monotonic clock; returns the names of those that
    failed.
    """
    failures = []
    for place, measurement in enumerate(measurements):
        progress(f"measuring {measurement.name}: python -m {' '.join(measurement.words)}")
        later = sum_budgets(measurements[place + 1 :])
        limit = min(KILLED_AT * measurement.budget, end - time.monotonic() - later)
        path = flags.folder / measurement.file
        try:
            measure_document(measurement, path, flags.peer_python, limit)
        except UserError as error:
            progress(f"failed: {error}")
            failures.append(measurement.name)
    return failures


def write_readmes(end: float) -> None:
    """Writes READMEs and pictures before `end`, on the monotonic clock. Raises UserError where that
    fails.
    """
    progress("writing: python -m bench.docs.readmes")
    run_process(["bench.docs.readmes"], max(WRITING_SECONDS, end - time.monotonic()))


def measure_document(measurement: Measurement, path: Path, peer_python: Path | None, limit: float) -> None:
    """Measures a document by its processes, one after the other, and writes it.

    No further process starts once the next would end beyond the budget, if MIN_ROUNDS rounds are
    there. Raises UserError where one fails, after `limit` seconds too.
    """
    begin = time.monotonic()
    watch = Watch()
    documents: list[Json] = []
    longest = 0.0  # seconds of a process
    for number in range(measurement.processes):
        elapsed = time.monotonic() - begin
        has_enough = number * (measurement.rounds or MIN_ROUNDS) >= MIN_ROUNDS
        if has_enough and elapsed + longest + RATES_SECONDS > measurement.budget:
            break
        if measurement.processes > 1:
            progress(f"process {number + 1} of at most {measurement.processes}")
        seconds = max(0.0, ROUNDS_SHARE * measurement.budget - elapsed)
        words = command_words(measurement, path.parent, peer_python, seconds)
        documents.append(run_measurement(words, limit - elapsed - RATES_SECONDS))
        longest = max(longest, time.monotonic() - begin - elapsed)
    if len({document["sources"] for document in documents}) > 1:
        raise UserError("The measured sources changed between two processes.")
    if measurement.has_peer and not documents[0]["peers"]:
        raise UserError("No peer is installed here: --peer-python names the Python that has it.")
    document = pool(documents)
    for key in measurement.drop:
        del document[key]
    document["machine"] |= watch.finish()
    document["processes"] = len(documents)
    write_text(path, f"{json.dumps(document)}\n")


def command_words(
    measurement: Measurement, folder: Path, peer_python: Path | None, seconds: float
) -> list[str]:
    """Returns what follows `python -m` for one process, which adds no rounds after `seconds`."""
    words = [*measurement.words, "--json", "--seconds", f"{seconds:.0f}"]
    if measurement.rounds:
        words += ["--rounds", str(measurement.rounds)]
    if measurement.has_peer and peer_python:
        words += ["--peer-python", str(peer_python)]
    if measurement.name == "bench":  # takes the claim of the documents beside it, and writes its page there
        words += ["--out", str(folder)]
    return words


def run_measurement(words: Sequence[str], limit: float) -> Json:
    """Runs a measurement and returns its document. A missed bar is no failure. Raises UserError for
    one, and after `limit` seconds.
    """
    output = run_process(words, limit)
    if not output.strip():
        raise UserError(f"python -m {' '.join(words)} printed nothing.")
    return json.loads(output)


def run_process(words: Sequence[str], limit: float) -> str:
    """Runs `python -m words` and returns what it printed; kills it, and all that it started, after
    `limit` seconds. Raises UserError for that, and for an exit code other than 0 and 1.
    """
    with subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, which ends as one
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(0.0, limit))
        except subprocess.TimeoutExpired:
            raise UserError(f"python -m {' '.join(words)} was killed after {limit:.0f} s.") from None
        finally:
            # There may be nothing left of the group, which macOS says otherwise.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode not in (0, 1):
        raise UserError(f"python -m {' '.join(words)} ended with {process.returncode}.")
    return output


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

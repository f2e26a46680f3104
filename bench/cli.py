"""Runs the command line of every measurement: flags in, tables or JSON out, errors in a sentence.

A measurement imports JAX after its flags are parsed, and rich for its tables: --help needs neither,
and the allocator is set before JAX starts. Shapes of a model and its batch are written
LAYERSxWIDTHxTOKENSxBATCH.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import tyro

from bench.deadline import set_deadline
from bench.machine import Json, Watch, busy_cores, describe_machine
from bench.sources import ROOT, digest_sources
from engine.device import device_name
from engine.errors import UserError
from engine.files import write_problem, write_text
from engine.processor import cores

REPORT_SECONDS = 5.0  # between two lines on a process's progress, on a terminal
PIPED_REPORT_SECONDS = 30.0  # elsewhere, where a line does not replace the one before
# What measurements write in this checkout, as git excludes it.
WRITTEN = (":(exclude)bench/results", ":(exclude)bench/pictures", ":(exclude,glob)**/README.md")
# keys of a document: whether a bar is met, None where that is undecided
VERDICTS = ("met", "ready_met", "holds")
UNTIMED = ("bench compare", "bench.plan", "bench.everything")
QUIET = 1 / 4  # of the cores, which others may use before a measurement says so
# What README's figures are held to; printed by each measurement with a bar.
BARS_HOLD = (
    "The bars hold on two quiet cores with AVX-512. On another processor a bar that is not met says little."
)


class Shape(NamedTuple):
    """A model and its batch; heads are 64 wide."""

    layers: int
    width: int
    tokens: int
    batch: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def run_bench[Flags](
    name: str,
    about: str | None,
    flags: type[Flags],
    measure: Callable[[Flags], Json],
    args: Sequence[str] | None = None,
    write_pages: Callable[[Path, Json], Path | None] | None = None,
) -> int:
    """Runs a measurement's command line and returns its exit code.

    - `name` follows `python -m`; `args` are None for the command line's.
    - `measure` takes the flags, prints tables, and returns a document, to which `circumstances` are
      added.
    - With --out the document goes into that folder, into the file of `_document_name`.
    - With --json it is printed as a line on stdout, and all else on stderr.
    - After --seconds no rounds are added, but for the fewest of a verdict.
    - `write_pages` takes the file in the folder of --out and what it holds, and returns the page.
    - The first line says when others use this machine.
    - The code is 0, or 1 when a bar is certainly missed (False under one of VERDICTS).
    - UserError and OSError return 2, with a sentence on stderr.
    - Ctrl-C returns 130, a closed pipe 141.
    """
    try:
        options = tyro.cli(
            _with_common(flags, name),
            prog=f"python -m {name}",
            description=about,
            args=args,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            words = sys.argv[1:] if args is None else args
            document = _measure_document(name, options, words, measure)
            text = json.dumps(document, default=str)
        if options.out:
            source = options.out / f"{_document_name(name, options)}.json"
            _write_document(source, text, document, write_pages)
        if options.json:
            print(text, flush=True)
        return int(_has_missed(document))
    except SystemExit as leaving:  # tyro has printed why
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads on; Python would say so once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _measure_document[Flags](
    name: str, options: Any, words: Sequence[str], measure: Callable[[Flags], Json]
) -> Json:
    """Returns the document of a measurement with its circumstances, which `words` of the command line
    are among. Raises UserError where --out cannot be written, before anything is measured.
    """
    problem = write_problem(options.out) if options.out else None
    if problem:
        raise UserError(f"--out {options.out} cannot be written: {problem}. Choose another folder.")
    about = circumstances([*name.split(), *words], options)
    watch = None
    if name not in UNTIMED and not getattr(options, "list", False):
        others = busy_cores()
        about["load"] = others  # at this moment, in place of the last minute's mean
        if others > QUIET * cores():
            print(f"others use {others:.1f} of {cores()} cores: trust ratios alone", flush=True)
        if options.out:
            watch = Watch()
    set_deadline(getattr(options, "seconds", None))
    result = measure(options)
    machine = about["machine"]
    if "jax" in sys.modules:
        machine["device"] = device_name()
    if watch:
        machine.update(watch.finish())
    machine.update(result.pop("machine", {}))
    return about | result


def _write_document(
    source: Path, text: str, document: Json, write_pages: Callable[[Path, Json], Path | None] | None
) -> None:
    """Writes the text of a document, then its page, which is named on stderr."""
    write_text(source, f"{text}\n")
    if write_pages is None:
        return
    page = write_pages(source, document)
    if page:
        print(f"the page: {page}", file=sys.stderr)


def _has_missed(value: Any) -> bool:
    """Whether a bar in a document is missed: False under one of VERDICTS. None, undecided, is no
    miss.
    """
    if isinstance(value, dict):
        return any(value.get(key) is False for key in VERDICTS) or any(map(_has_missed, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_missed, value))


def _stem(name: str) -> str:
    """Returns `step` for `bench.step`, `compare` for `bench compare`."""
    return name.replace(" ", ".").rpartition(".")[2]


def _document_name(name: str, options: Any) -> str:
    """Returns `step` for bench.step, or `step-finetuning` where --of is not its default."""
    of = getattr(options, "of", None)
    if of == getattr(type(options), "of", None):
        parts = []
    elif isinstance(of, str):
        parts = [of]
    else:
        parts = [*(of or ())]
    return "-".join([_stem(name), *parts])


def run_module(command: Sequence[str], report: Callable[[], None] = lambda: None) -> str:
    """Runs `python -m command`, calls `report` every REPORT_SECONDS or PIPED_REPORT_SECONDS, and
    returns what it printed.

    The process ends when this one is interrupted. Raises UserError with the process's own error
    when it fails.
    """
    words = [sys.executable, "-m", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if sys.stderr.isatty():
        interval = REPORT_SECONDS
    else:
        interval = PIPED_REPORT_SECONDS
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output,
        subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        ) as process,
    ):
        try:
            while process.returncode is None:
                try:
                    process.wait(interval)
                except subprocess.TimeoutExpired:
                    report()
        finally:
            process.kill()
        output.seek(0)
        printed = output.read()
        if process.returncode:
            error = " ".join(printed.rpartition("error: ")[2][-600:].split())
            raise UserError(f"python -m {command[0]} ended with {process.returncode}: {error}")
    return printed


def circumstances(command: Sequence[str], flags: Any) -> Json:
    """Returns what each document says of its measurement: the machine, the commit, the digest of the
    measured sources, date, versions, load and flags.
    """
    if command[0].endswith(".py"):
        program = command[0]
    else:
        program = f"-m {command[0]}"
    return {
        "machine": describe_machine(),
        "commit": commit_of_sources(),
        "sources": digest_sources(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "numpy")},
        "command": f"python {program} {shlex.join(command[1:])}".strip(),
        "flags": dataclasses.asdict(flags),
    }


def commit_of_sources() -> str | None:
    """Returns the commit of this checkout, with `-dirty` where a file differs that no measurement
    writes; None without git.
    """
    if not (ROOT / ".git").exists():
        return None
    git = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
        if changed:
            return f"{commit}-dirty"
        return commit
    return None


def _with_common(flags: type[Any], name: str) -> type[Any]:
    """Returns the flags with --json, --out and, where something is timed, --seconds.

    The help says INT for `int | None` and `off` for False.
    """
    hints = get_type_hints(flags, include_extras=True)
    kinds = get_type_hints(flags)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(flags):
        kind = kinds[field.name]
        shown = _plain_help(kind)
        if shown is not None:
            own = getattr(hints[field.name], "__metadata__", ())
            annotation: Any = Annotated[kind, shown, *own]
            fields.append((field.name, annotation, dataclasses.field(default=field.default)))
    about_json = tyro.conf.arg(help="Print one line of JSON on standard output, and nothing else there.")
    fields.append(("json", Annotated[bool, _plain_help(bool), about_json], False))
    if name not in UNTIMED:
        about_seconds = tyro.conf.arg(
            metavar="SECONDS",
            help="After which no rounds are added; 6 are made even so.",
            help_behavior_hint="",
        )
        fields.append(("seconds", Annotated[float | None, about_seconds], None))
    if "out" not in hints:
        stem = _stem(name)
        if "of" in hints:
            help = f"A folder for {stem}.json, or {stem}-OF.json where --of is another."
        else:
            help = f"A folder for {stem}.json."
        about_out = tyro.conf.arg(metavar="PATH", help=help, help_behavior_hint="")
        fields.append(("out", Annotated[Path | None, about_out], None))
    return dataclasses.make_dataclass(flags.__name__, fields, bases=(flags,), frozen=True)


def _plain_help(kind: Any) -> Any:
    """Returns how the help shows a flag of this type, in place of tyro's way; None to leave that."""
    if kind is bool:
        return tyro.conf.arg(help_behavior_hint="(default: off)")
    alternatives = get_args(kind)
    if type(None) in alternatives:
        return tyro.conf.arg(metavar=alternatives[0].__name__.upper(), help_behavior_hint="")
    return None


def parse_shape(flag: str, text: str) -> Shape:
    """Parses '6x384x256x16' as Shape(6, 384, 256, 16). Raises UserError, naming the flag, for
    anything else, or a width that is no multiple of a head's 64.
    """
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts) or int(parts[1]) % 64:
        raise UserError(
            f"{flag} is LAYERSxWIDTHxTOKENSxBATCH with a width in 64s, such as 6x384x256x16, not {text!r}."
        )
    return Shape(*map(int, parts))


def check_rounds(rounds: int) -> None:
    """Raises UserError for no round. With fewer than six a ratio has no interval, which it says."""
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}.")

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
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import tyro

from bench.machine import Json, Watch, describe_machine
from engine.device import cores, device_name
from engine.errors import UserError
from engine.files import write_problem, write_text

ROOT = Path(__file__).parent.parent
# of pages that have some
LOG_CHARTS = [ROOT / "bench" / "stages" / "page" / f"log_charts.{kind}" for kind in ("css", "js")]
REPORT_SECONDS = 5.0  # between two lines on a process's progress, on a terminal
PIPED_REPORT_SECONDS = 30.0  # elsewhere, where a line does not replace the one before
PIPED_WIDTH = 160  # of a pipe: the widest table fits
# What measurements write in this checkout, as git excludes it.
WRITTEN = (":(exclude)bench/results", ":(exclude)bench/pictures", ":(exclude,glob)**/README.md")
# keys of a document: whether a bar is met, None where that is undecided
VERDICTS = ("met", "ready_met", "holds")
UNTIMED = ("bench compare", "bench.plan", "bench.everything")
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
    """Parses flags and calls `measure`, which prints tables; returns 0, or 2 after a UserError or
    OSError.

    The document that `measure` returns goes with its `circumstances` into the folder of --out, as a
    file named by the end of `name`, and by what of it is measured (`--of`) where that is not the
    default; with --json it is printed as a line on stdout, and all else on stderr. The first line
    says when others use this machine. A bar that is certainly missed (False under one of VERDICTS)
    returns 1. An error is a sentence on stderr; Ctrl-C returns 130, a closed pipe 141. `args`: None
    for the command line's. `name` follows `python -m`. `write_pages` takes the file in the folder
    of --out and what it holds, and returns the page.
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
            problem = write_problem(options.out) if options.out else None
            if problem:
                raise UserError(f"--out {options.out} cannot be written: {problem}. Choose another folder.")
            beside = circumstances([*name.split(), *(sys.argv[1:] if args is None else args)], options)
            watch = None
            if name not in UNTIMED and not getattr(options, "list", False):
                beside["load"] = busy_cores()
                if beside["load"] > cores() / 4:
                    print(
                        f"others use {beside['load']:.1f} of {cores()} cores: trust ratios alone", flush=True
                    )
                if options.out:
                    watch = Watch()
            result = measure(options)
            if "jax" in sys.modules:
                beside["machine"]["device"] = device_name()
            if watch:
                beside["machine"] |= watch.finish()
            beside["machine"] |= result.pop("machine", {})
            document = json.dumps(beside | result, default=str)
        if options.out:
            source = options.out / f"{_document_name(name, options)}.json"
            write_text(source, f"{document}\n")
            if write_pages:
                page = write_pages(source, result)
                if page:
                    print(f"the page: {page}", file=sys.stderr)
        if options.json:
            print(document, flush=True)
        return int(_has_missed(result))
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


def _has_missed(value: Any) -> bool:
    """Whether a bar in a document is missed: False under one of VERDICTS. None, undecided, is no
    miss.
    """
    if isinstance(value, dict):
        return any(value.get(key) is False for key in VERDICTS) or any(map(_has_missed, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_missed, value))


def _document_name(name: str, options: Any) -> str:
    """Returns `step` for bench.step, or `step-finetuning` where --of is not its default."""
    of = getattr(options, "of", None)
    if of == getattr(type(options), "of", None):
        parts = []
    elif isinstance(of, str):
        parts = [of]
    else:
        parts = [*(of or ())]
    return "-".join([name.replace(" ", ".").rpartition(".")[2], *parts])


def write_page(source: Path, page: str, *parts: Path) -> Path:
    """Writes a page of the site beside a document: that of the lives, or one of these parts.
    Returns its path.
    """
    path = source.with_name(page)
    run_module(["stages.runs.watch", str(source), str(path), *map(str, parts)])
    return path


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
    """Returns what each document says of its measurement: the machine, the commit, date, versions,
    load and flags.
    """
    if command[0].endswith(".py"):
        program = command[0]
    else:
        program = f"-m {command[0]}"
    return {
        "machine": describe_machine(),
        "commit": commit_of_sources(),
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


def busy_cores() -> float:
    """Returns how many cores others use now, on this machine or, where it is a virtual one, beside
    it.

    Looks for half a second where there is /proc/stat; else it is the mean of the last minute.
    """
    path = Path("/proc/stat")
    ticks = []
    for wait in (0.5, 0.0) if path.exists() else ():
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, path.read_text().split()[1:9])
        ticks.append((user + nice + system + irq + softirq + steal, idle + iowait))
        time.sleep(wait)
    if len(ticks) < 2:
        return os.getloadavg()[0]
    before, after = ticks
    total = sum(after) - sum(before)
    if total <= 0:
        return os.getloadavg()[0]
    return (after[0] - before[0]) / total * (os.cpu_count() or 1)


def _with_common(flags: type[Any], name: str) -> type[Any]:
    """Returns the flags with --json and --out, and with a help that says INT for `int | None` and
    `off` for False.
    """
    off = tyro.conf.arg(help_behavior_hint="(default: off)")
    hints = get_type_hints(flags, include_extras=True)
    for field, kind in get_type_hints(flags).items():
        if kind is bool or type(None) in get_args(kind):
            if kind is bool:
                plain = off
            else:
                plain = tyro.conf.arg(metavar=get_args(kind)[0].__name__.upper(), help_behavior_hint="")
            flags.__annotations__[field] = Annotated[kind, plain, *getattr(hints[field], "__metadata__", ())]
    about = tyro.conf.arg(help="Print one line of JSON on standard output, and nothing else there.")
    more: list[tuple[str, Any, Any]] = [("json", Annotated[bool, off, about], False)]
    if "out" not in hints:
        stem = name.replace(" ", ".").rpartition(".")[2]
        file = (
            f"A folder for {stem}.json" + f", or {stem}-OF.json where --of is another" * ("of" in hints) + "."
        )
        more.append(
            (
                "out",
                Annotated[Path | None, tyro.conf.arg(metavar="PATH", help=file, help_behavior_hint="")],
                None,
            )
        )
    return dataclasses.make_dataclass(flags.__name__, more, bases=(flags,), frozen=True)


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


def progress(text: str, replace: bool = False) -> None:
    """Prints a line of progress on stderr; on a terminal, the next line replaces one with
    `replace`.
    """
    terminal = sys.stderr.isatty()
    print(
        "\x1b[2K" * terminal + text, end="\r" if replace and terminal else "\n", file=sys.stderr, flush=True
    )


def console() -> Any:
    """Returns a rich console on stdout; off a terminal, a plain one that is wide enough for the
    tables.
    """
    from rich.console import Console

    terminal = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return Console(highlight=False, width=None if terminal else PIPED_WIDTH, force_terminal=terminal)


def print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """Prints a table whose first `left` columns are aligned left, the others right. What is too
    wide is folded, never cut.
    """
    from rich import box
    from rich.table import Table

    grid = Table(
        title=title,
        box=box.SIMPLE_HEAD if any(heads) else None,
        title_justify="left",
        pad_edge=False,
        title_style="bold",
    )
    for place, head in enumerate(heads):
        grid.add_column(head, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console().print(grid)

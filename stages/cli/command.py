"""Runs a command: parses its flags, returns its exit code, and prints a sentence for every mistake."""

import atexit
import contextlib
import dataclasses
import errno
import gc
import io
import os
import shlex
import shutil
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

from engine.errors import UserError
from engine.mesh.processes import MISTAKE
from stages.cli import lifecycle, signals

# What takes less memory, by the flags of a command.
LESS_MEMORY = {
    "batch": "a smaller --batch",
    "context": "a smaller --context",
    "accumulate": "--accumulate, to read the batch in parts",
    "remat": "--remat for gradient checkpointing",
    "count": "a smaller --count",
    "prompts": "fewer --prompts",
    "group": "a smaller --group",
    "slots": "fewer --slots",
    "capacity": "a smaller --capacity",
    "keys_values": "--keys-values int8",
    "max_tokens": "fewer --max-tokens",
}
# New objects between two collections: importing JAX and tracing a program make fewer, nearly all of
# which stay. Looking at them every 2,000 is 7% of the time to a first token.
STARTING_OBJECTS = 300_000
NOBODY_READS = 141  # the exit code of a command whose output nobody reads: 128 + SIGPIPE
START_FIELD = 22  # of /proc/PID/stat: when the process started, in ticks since boot (proc(5))
_arguments: list[str] = []
_IMPORTED = time.perf_counter()


def run_command[Flags](
    name: str,
    about: str | None,
    flags: type[Flags],
    command: Callable[[Flags], int | None],
    args: Sequence[str] | None = None,
    one_arena: bool = True,
) -> int:
    """Parses `args` (the command line's when None) into `flags`, runs the command, returns its exit
    code.

    `name` is the stage's; `about` heads its help; `one_arena`: see `keep_freed_memory`.
    `check_together` of the flags and of their groups raises UserError for flags that do not go
    together. The code is MISTAKE for an error that `explain_error` explains, 128 + the signal when
    stopped, NOBODY_READS when nobody reads the output any more.
    """
    _arguments[:] = sys.argv[1:] if args is None else args
    options = None
    outlive_terminal()
    try:
        options = tyro.cli(
            flags,
            prog=f"python -m stages.{name}",
            description=_wrapped(about or ""),
            args=args,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        for group in (*vars(options).values(), options):
            # not in __post_init__: tyro would name our classes before the sentence
            if hasattr(group, "check_together"):
                group.check_together()
        gc.enable()
        gc.set_threshold(STARTING_OBJECTS)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        if one_arena:
            from engine.allocator import keep_freed_memory  # loads ctypes, which --help does without

            # before the thread that reads signals starts: it would have a second heap made
            keep_freed_memory()
        with signals.handle_signals():
            return command(options) or 0
    except SystemExit as exit:  # tyro has printed the help, or the mistake in a flag
        return int(exit.code or 0)
    except BrokenPipeError:
        lifecycle.end(NOBODY_READS, "nobody reads its output.")
        # Python flushes stdout on its way out and would complain once more.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except Exception as error:
        sentence = explain_error(error, options)
        if sentence is None:
            lifecycle.end_for_error(error)
            raise
        if getattr(options, "verbose", False):
            traceback.print_exc()
        lifecycle.end(MISTAKE, sentence)
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        return MISTAKE
    finally:
        signals.set_phase("after the command was over; nothing is lost.")


def _wrapped(about: str) -> str:
    """Returns the text with its later paragraphs wrapped and indented: tyro joins lines that are
    not indented.
    """
    width = shutil.get_terminal_size().columns
    first, *rest = about.strip().split("\n\n")
    paragraphs = [first]
    for text in rest:
        if not text.startswith(" "):
            text = textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ")
        paragraphs.append(text)
    return "\n\n".join(paragraphs)


def explain_error(error: BaseException, flags: Any = None) -> str | None:
    """Returns the sentence for an error of the user or the machine, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_system_error(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        names = _flag_names(flags)
        advice = [*(words for name, words in LESS_MEMORY.items() if name in names), "a smaller model"]
        return f"There is not enough memory for this. What takes less: {'; '.join(advice)}."
    return None


def _flag_names(flags: Any) -> set[str]:
    if not dataclasses.is_dataclass(flags):
        return set()
    return {field.name for field in dataclasses.fields(flags)}.union(*map(_flag_names, vars(flags).values()))


def _explain_system_error(error: OSError) -> str:
    name = ""
    if error.filename:
        name = f"{error.filename}: "
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with contextlib.suppress(OSError, TypeError, ValueError):
            path = Path(error.filename).absolute()
            path = next(folder for folder in (path, *path.parents) if folder.exists())
            free = f" ({shutil.disk_usage(path).free / 1e6:,.1f} MB are free there)"
        remedy = "What was saved before is untouched; make room, or choose another folder."
        return f"{name}the disk is full{free}. {remedy}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = os.strerror(error.errno)
        return f"{name}{reason}: this user may not write or read there. Choose another folder or file."
    return f"{name}{error.strerror or error}."


def command_line(stage: str, *words: object) -> str:
    prefix = "uv run " if os.environ.get("UV") else ""
    return f"{prefix}python -m stages.{stage} {shlex.join(map(str, words))}".rstrip()


def typed_arguments() -> list[str]:
    return _arguments


def resume_command(stage: str) -> str:
    return command_line(stage, *(word for word in _arguments if word != "--overwrite"))


def process_start() -> float:
    """Returns the start of this process in `time.perf_counter`; without /proc, of this file's
    import.
    """
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        # The second field, the command's name in brackets, may hold spaces; the third is the first
        # behind it.
        _, _, behind_name = Path("/proc/self/stat").read_text().rpartition(")")
        ticks = int(behind_name.split()[START_FIELD - 3])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter() - age
    return _IMPORTED


class _Terminal(io.FileIO):
    """A terminal to print on: once it is closed, what is printed is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def outlive_terminal() -> None:
    """Lets this process print on, and save what it does, when the terminal is closed or lacks a
    character (it is escaped).
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        # closed by `>&-`, and the next file that is opened would get its number
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and stream.isatty():
            stream.flush()
            buffer = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True))


def leave(code: int) -> NoReturn:
    """Ends the process, its exit functions run, without taking the interpreter down, when signals
    have no sentence.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 120  # as Python says it
    os._exit(code)

"""`python -m stages`, and `thrice` where it is installed: lists the stages of a model's life, or runs the one that is named."""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import ast
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import did_you_mean
from stages.cli.command import MISTAKE, leave

HERE = Path(__file__).parent
ORDER = (
    "train",
    "finetune",
    "reinforce",
    "evaluate",
    "generate",
    "chat",
    "serve",
    "export",
    "by_hand",
    "train_here",
)


def stage_files() -> dict[str, Path]:
    """Returns {stage: the file of its command}, in the order of a model's life."""
    files = {path.stem: path for path in HERE.glob("[!_]*.py")}
    files |= {path.parent.name: path for path in HERE.glob("*/__main__.py")}
    names = [name for name in ORDER if name in files]
    names += sorted(files.keys() - {*ORDER})
    return {name: files[name] for name in names}


def stages() -> dict[str, str]:
    """Returns {stage: the first line of its docstring}, read without importing anything."""
    lines = {}
    for name, path in stage_files().items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines[name] = docstring.splitlines()[0]
    return lines


def list_stages() -> None:
    lines = stages()
    width = max(map(len, lines))
    print("The stages of a model's life; each explains itself with --help:\n")
    for name, line in lines.items():
        print(f"  python -m stages.{name:<{width}}  {line}")


def main(args: Sequence[str]) -> int:
    """Lists the stages, or runs the one that the first argument names with the others; returns its
    exit code.
    """
    if not args or args[0] in ("-h", "--help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads on, as of `| head`
        list_stages()
        return 0
    name, *words = args
    files = stage_files()
    if name not in files:
        known = [*files]
        print(f"There is no stage {name!r}.{did_you_mean(name, known)}", file=sys.stderr)
        return MISTAKE
    module = f"stages.{name}"
    if files[name].stem == "__main__":
        module += ".__main__"
    return importlib.import_module(module).main(words)


def run_named_stage() -> None:
    """Runs the stage that the command line names, and ends the process."""
    leave(main(sys.argv[1:]))


if __name__ == "__main__":
    run_named_stage()

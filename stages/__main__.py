"""`python -m stages`: the stages of a model's life, one line each."""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import ast
import signal
from pathlib import Path

from stages.cli.command import leave


def stages() -> dict[str, str]:
    """Returns {stage: the first line of its docstring}, read without importing anything."""
    here = Path(__file__).parent
    files = {path.stem: path for path in here.glob("[!_]*.py")} | {
        path.parent.name: path for path in here.glob("*/__main__.py")
    }
    order = ("train", "finetune", "reinforce", "evaluate", "generate", "chat", "serve", "export", "by_hand")
    names = [name for name in order if name in files]
    names += sorted(files.keys() - {*order})
    docs = {
        name: ast.get_docstring(ast.parse(files[name].read_text(encoding="utf-8"))) or "" for name in names
    }
    return {name: doc.splitlines()[0] for name, doc in docs.items()}


def main() -> int:
    lines = stages()
    width = max(map(len, lines))
    print("The stages of a model's life; each explains itself with --help:\n")
    for name, line in lines.items():
        print(f"  python -m stages.{name:<{width}}  {line}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads on, as of `| head`
    leave(main())

"""Train in a browser: writes one page with JAX compiled for the web, on which a small transformer learns and answers.

    python -m stages.train_here              train-here.html, to be opened with a browser
    python -m stages.train_here page.html

The page needs no server and fetches nothing. What it computes is what `stages.by_hand` computes.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import tyro

from engine.files import make_folder
from stages.cli.command import leave, run_command
from stages.cli.flags import VerboseFlag, parser, path


@dataclasses.dataclass(frozen=True)
class TrainHereFlags:
    """Where the page is written."""

    page: Annotated[tyro.conf.Positional[Path], parser(path, "PAGE")] = Path("train-here.html")
    """The page to write, HTML."""
    verbose: VerboseFlag = False


def write(flags: TrainHereFlags) -> None:
    from stages.runs.watch.page import write_train_page

    make_folder(flags.page.parent)
    written = write_train_page(flags.page)
    print(f"Open it with a browser: {written.resolve().as_uri()}")


main = functools.partial(run_command, "train_here", __doc__, TrainHereFlags, write)


if __name__ == "__main__":
    leave(main())

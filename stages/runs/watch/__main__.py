"""Write the page of a recording of a model's lives.

    python -m stages.runs.watch DOCUMENT.json PAGE.html

`python -m bench.lives` makes the document and calls this. train.html, in which a browser trains, is written beside the page.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from engine.files import make_folder
from stages.cli.command import leave, run_command
from stages.cli.flags import parser, path
from stages.runs.watch.page import write_page, write_train_page

MAX_DOCUMENT_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class PageFlags:
    """The two files."""

    document: Annotated[tyro.conf.Positional[Path], parser(path, "DOCUMENT")]
    """The recording, JSON."""
    page: Annotated[tyro.conf.Positional[Path], parser(path, "PAGE")]
    """The page to write, HTML."""


def make_page(flags: PageFlags) -> None:
    from engine.untrusted import read_json_object  # loads NumPy, which --help does without

    document = read_json_object(flags.document, MAX_DOCUMENT_BYTES)
    make_folder(flags.page.parent)
    write_page(document, flags.page)
    write_train_page(flags.page.parent)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("runs.watch", __doc__, PageFlags, make_page, args)


if __name__ == "__main__":
    leave(main())

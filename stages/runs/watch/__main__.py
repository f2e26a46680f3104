"""Write a page of the site: that of a recording of a model's lives, or one with parts of its own.

    python -m stages.runs.watch lives.json lives.html
    python -m stages.runs.watch RECORDING.jsonl page.html    what a run with --record wrote
    python -m stages.runs.watch DOCUMENT.json PAGE.html BODY.html [STYLE.css] SCRIPT.js ...

`python -m bench.lives`, `bench` and `bench.plan` make a document and call this. train.html, in
which a browser trains, is written beside the page of lives.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import tyro

from engine.errors import UserError
from engine.files import make_folder
from stages.cli.command import leave, run_command
from stages.cli.flags import parser, path
from stages.runs.watch.page import read_recording, write_page, write_train_page

MAX_DOCUMENT_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class PageFlags:
    """The files."""

    document: Annotated[tyro.conf.Positional[Path], parser(path, "DOCUMENT")]
    """A recording, or another document: JSON."""
    page: Annotated[tyro.conf.Positional[Path], parser(path, "PAGE")]
    """The page to write, HTML."""
    parts: tyro.conf.Positional[tuple[Annotated[Path, parser(path, "PART")], ...]] = ()
    """Parts of a page of its own, in place of those of the lives: a body in HTML, then styles and scripts."""


def make_page(flags: PageFlags) -> None:
    from engine.untrusted import read_json_object  # loads NumPy, which --help does without

    document = read_recording(flags.document)
    if document is None and flags.document.suffix == ".jsonl":
        raise UserError(f"{flags.document} is no recording of a run: a run with --record FILE writes one.")
    document = document or read_json_object(flags.document, MAX_DOCUMENT_BYTES)
    make_folder(flags.page.parent)
    if flags.parts:
        write_page(document, flags.page, flags.parts)
    else:
        write_page(document, flags.page)
        write_train_page(flags.page.parent / "train.html")


main = functools.partial(run_command, "runs.watch", __doc__, PageFlags, make_page)


if __name__ == "__main__":
    leave(main())

"""Makes the pages of the site, and *Train it here*: each is one HTML file with all that it needs inside, and asks no network.

The shell, its style and what draws charts and tables lie beside this file, and the parts of the page on which a model's lives
are watched. Another page has parts of its own. Pages that lie in one folder name one another.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import atomic_file

LINES = 300  # of metrics, of a life
FOLDER = Path(__file__).parent
PARTS = re.compile(r'<link rel="stylesheet" href="([./\w]+\.css)">|<script src="(\w+\.js)"></script>')
LIVES = [FOLDER / name for name in ("lives.html", "state.js", "words.js", "model.js", "chapters.js", "page.js", "live.js")]
SITE = {"lives.html": "Three lives", "report.html": "What each stage costs", "plan.html": "What it will take"}
LINKS = re.compile(r'(<nav id="site" aria-label="Pages">).*?(</nav>)')


def page_html(document: dict[str, Any], parts: Sequence[Path] = LIVES) -> str:
    """Returns the page of a document, drawn by `parts`: a body in HTML, then styles and scripts.

    Those of the lives draw what `bench.lives` writes, or a part of it. Raises UserError for a number that is not finite.
    """
    try:
        recording = json.dumps(_smaller(document), separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError("The recording holds a number that is not finite: null is what should stand there.") from None
    page = _whole(FOLDER / "shell.html")
    for path in parts:
        text = path.read_text("utf-8")
        place, part = {
            ".html": ("<!-- page -->", text),
            ".css": ("</head>", f"<style>\n{text}</style>\n"),
            ".js": ("</body>", f"<script>\n{text}</script>\n"),
        }[path.suffix]
        page = page.replace(place, part + place)
    # The document last: nothing in it is taken for a place of the shell.
    return page.replace('id="recording">{}', f'id="recording">{recording.replace("<", "\\u003c")}')


def _whole(path: Path) -> str:
    """Returns an HTML file with the styles and scripts inside that it names."""

    def inside(match: re.Match[str]) -> str:
        tag = "style" if match[1] else "script"
        return f"<{tag}>\n{(path.parent / (match[1] or match[2])).read_text('utf-8')}</{tag}>"

    return PARTS.sub(inside, path.read_text("utf-8"))


def write_page(document: dict[str, Any], path: Path, parts: Sequence[Path] = LIVES) -> None:
    """Writes the page, whole or not at all, and links it with the pages of SITE beside it. Raises UserError as `page_html`."""
    _write(path, page_html(document, parts))
    present = [path.with_name(name) for name in SITE if path.with_name(name).is_file()]
    for each in present if len(present) > 1 else ():
        links = (
            f'<a href="{other.name}"{' aria-current="page"' * (other == each)}>{SITE[other.name]}</a>' for other in present
        )
        text = each.read_text("utf-8")
        if (linked := LINKS.sub(rf"\1{' '.join(links)}\2", text, count=1)) != text:
            _write(each, linked)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _smaller(document: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is not seen, for a page of a megabyte whatever the machine: most lines of a long life, and digits.

    A tensor whose mosaic is that of the frame before is left out too: the page looks back for it.
    """
    lives = document.get("lives")
    smaller = {}
    for name, life in lives.items() if isinstance(lives, dict) else ():
        last: dict[str, str] = {}
        frames = []
        for frame in (life or {}).get("frames", []):
            mosaic = {path: pixels for path, pixels in frame.get("mosaic", {}).items() if last.get(path) != pixels}
            last |= mosaic
            rounded = {kind: _rounded(frame[kind]) for kind in ("gradient_norms", "limits") if kind in frame}
            frames.append(frame | rounded | {"mosaic": mosaic})
        smaller[name] = life and life | {"frames": frames}
        if life and len(steps := life.get("steps", [])) > LINES:
            smaller[name]["steps"] = [_rounded(steps[place * (len(steps) - 1) // (LINES - 1)]) for place in range(LINES)]
    return document | {"lives": smaller} if smaller else document


def _rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in numbers.items()}


def write_train_page(folder: Path) -> Path:
    """Writes `folder`/train.html whole; returns its path. The library in it is text until somebody presses a button."""
    here = FOLDER / "train_here"
    licence, library = ((here / "vendor" / name).read_text("utf-8") for name in ("LICENSE-jax", "jax.js"))
    html = _whole(here / "train.html").replace('id="library">', f'id="library">\n/*\n{licence}*/\n{library}')
    _write(folder / "train.html", html)
    return folder / "train.html"

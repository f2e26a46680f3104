"""Makes the page on which a model's lives are watched, and *Train it here*, in which a browser trains a model.

Each is one HTML file with its style and scripts inside, which lie beside this file. Neither asks for anything from a network.
"""

import json
import re
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import atomic_file

LINES = 300  # of metrics, of a life
FOLDER = Path(__file__).parent
PARTS = re.compile(r'<link rel="stylesheet" href="([./\w]+\.css)">|<script src="(\w+\.js)"></script>')


def page_html(document: dict[str, Any]) -> str:
    """Returns the page of a recording: the lives, answers and costs that `bench.lives` writes, or a part of them.

    Raises UserError for a number that is not finite.
    """
    try:
        recording = json.dumps(_smaller(document), separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError("The recording holds a number that is not finite: null is what should stand there.") from None
    return _whole(FOLDER / "page.html").replace('id="recording">{}', f'id="recording">{recording.replace("<", "\\u003c")}')


def _whole(path: Path) -> str:
    """Returns an HTML file with the styles and scripts inside that it names."""

    def inside(match: re.Match[str]) -> str:
        tag = "style" if match[1] else "script"
        return f"<{tag}>\n{(path.parent / (match[1] or match[2])).read_text('utf-8')}</{tag}>"

    return PARTS.sub(inside, path.read_text("utf-8"))


def write_page(document: dict[str, Any], path: Path) -> None:
    """Writes the page, whole or not at all. Raises UserError as `page_html` does."""
    html = page_html(document)
    with atomic_file(path) as file:
        file.write(html.encode())


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
    with atomic_file(folder / "train.html") as file:
        file.write(html.encode())
    return folder / "train.html"

"""Makes the page on which a model's lives are watched: one HTML file with its style, scripts and recording inside.

Its parts lie beside this file. The page asks for nothing from a network.
"""

import json
import re
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import atomic_file

LINES = 300  # of metrics, of a life
PARTS = re.compile(r'<link rel="stylesheet" href="(\w+\.css)">|<script src="(\w+\.js)"></script>')


def page_html(document: dict[str, Any]) -> str:
    """Returns the page of a recording: the lives, answers and costs that `bench.lives` writes, or a part of them.

    Raises UserError for a number that is not finite.
    """
    folder = Path(__file__).parent

    def inside(match: re.Match[str]) -> str:
        tag = "style" if match[1] else "script"
        return f"<{tag}>\n{(folder / (match[1] or match[2])).read_text('utf-8')}</{tag}>"

    try:
        recording = json.dumps(_smaller(document), separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError("The recording holds a number that is not finite: null is what should stand there.") from None
    html = PARTS.sub(inside, (folder / "page.html").read_text("utf-8"))
    return html.replace('id="recording">{}', f'id="recording">{recording.replace("<", "\\u003c")}')


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

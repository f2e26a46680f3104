"""Makes the pages of the site, and *Train it here*, in the shell of `stages/runs/page`.

The parts of the page on which a model's lives are watched lie beside this file. Another page has
parts of its own. Pages that lie in one folder name one another.
"""

import ast
import contextlib
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import open_regular, write_text
from stages.runs.page import SHELL, whole_page

LINES = 300  # of metrics, of a life
BEGINNING = b'{"event": '  # of a recording
FOLDER = Path(__file__).parent
CHECKOUT = FOLDER.parents[3]
LIVES = [
    FOLDER / name
    for name in (
        "lives.html",
        "lives.css",
        "state.js",
        "words.js",
        "model.js",
        "chapters.js",
        "page.js",
        "live.js",
    )
]
TRAIN = [FOLDER / "train_here" / name for name in ("train.html", "train.css", "model.js", "page.js")]
TRAIN_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'wasm-unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
SITE = {
    "lives.html": "Three lives",
    "train.html": "Train it here",
    "report.html": "What each stage costs",
    "plan.html": "What it will take",
}
# The places of the shell before which a part stands.
PLACES = {".html": "<!-- page -->", ".css": "</head>", ".js": "</body>"}
LAW = re.compile(r"tests/\w+/\w+\.py::\w+")
LINKS = re.compile(r'(<nav id="site" aria-label="Pages">).*?(</nav>)')
# of a life, by the kind of event
LISTS = {"step": "steps", "validation": "validation", "frame": "frames"}
BY_TENSOR = ("mosaic", "limits", "changed_in", "gradient_norms")  # values of a frame


def page_html(document: dict[str, Any], parts: Sequence[Path] = LIVES) -> str:
    """Returns the page of a document, drawn by `parts`: a body in HTML, then styles and scripts.

    Those of the lives draw what `bench.lives` writes. Raises UserError for a number that is not
    finite.
    """
    html = _joined(tuple(parts))
    laws = {}
    for name in sorted({*LAW.findall(html)}):
        code = _law(name)
        if code:
            laws[name] = code
    try:
        recording = json.dumps(_smaller(document) | {"laws": laws}, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError(
            "The recording holds a number that is not finite: null is what should stand there."
        ) from None
    recording = recording.replace("<", "\\u003c")  # which would end the script that it stands in
    # The document last: nothing in it is taken for a place of the shell.
    return html.replace('id="recording">{}', f'id="recording">{recording}')


@functools.cache
def _joined(parts: tuple[Path, ...]) -> str:
    page = whole_page(SHELL)
    for path in parts:
        text = path.read_text("utf-8")
        if path.suffix == ".css":
            text = f"<style>\n{text}</style>\n"
        elif path.suffix == ".js":
            text = f"<script>\n{text}</script>\n"
        place = PLACES[path.suffix]
        page = page.replace(place, text + place)
    return page


@functools.cache
def _law(name: str) -> str:
    """Returns the function of this checkout's tests that a page names as its law; empty where the
    tests are not there."""
    path, _, function = name.partition("::")
    if not (CHECKOUT / path).is_file():
        return ""
    source = (CHECKOUT / path).read_text("utf-8")
    functions = [
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    return "".join(ast.get_source_segment(source, node) or "" for node in functions)


def read_recording(path: Path) -> dict[str, Any] | None:
    """Returns the document of a file that `--record` wrote, of one life; None for another file."""
    life: dict[str, Any] = {}
    with open_regular(path) as file:
        if file.read(len(BEGINNING)) != BEGINNING:
            return None
        file.seek(0)
        for line in file:
            # The last line may be half written.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                event = json.loads(line)
                if event["event"] in LISTS:
                    life.setdefault(LISTS[event["event"]], []).append(event)
                else:
                    life[event["event"]] = event
    name = life.get("begin", {}).get("life")
    return {"lives": {name: life} if isinstance(name, str) else {}}


def write_page(document: dict[str, Any], path: Path, parts: Sequence[Path] = LIVES) -> None:
    write_text(path, page_html(document, parts))
    _link_pages(path.parent)


def write_train_page(path: Path) -> Path:
    """Writes the page on which a browser trains; returns its path. The library in it is text until
    somebody presses a button."""
    vendor = TRAIN[0].parent / "vendor"
    licence = (vendor / "LICENSE-jax").read_text("utf-8")
    library = (vendor / "jax.js").read_text("utf-8")
    html = page_html({}, TRAIN).replace('id="library">', f'id="library">\n/*\n{licence}*/\n{library}')
    policy = f'<meta http-equiv="Content-Security-Policy" content="{TRAIN_POLICY}">\n'
    write_text(path, html.replace("<title>", policy + "<title>", 1))
    _link_pages(path.parent)
    return path


def _link_pages(folder: Path) -> None:
    present = [folder / name for name in SITE if (folder / name).is_file()]
    if len(present) < 2:
        return
    for page in present:
        links = []
        for other in present:
            current = ' aria-current="page"' if other == page else ""
            links.append(f'<a href="{other.name}"{current}>{SITE[other.name]}</a>')
        text = page.read_text("utf-8")
        linked = LINKS.sub(rf"\1{' '.join(links)}\2", text, count=1)
        if linked != text:
            write_text(page, linked)


def _smaller(document: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is not seen, for a page of a megabyte whatever the machine and the model:
    most lines of a long life, digits, and the paths of tensors, in whose order a frame's values
    are."""
    lives = document.get("lives")
    if not isinstance(lives, dict):
        return document
    smaller = {}
    for name, life in lives.items():
        if life:
            smaller[name] = life | {
                "frames": _smaller_frames(life),
                "steps": _fewer_steps(life.get("steps", [])),
            }
    return document | {"lives": smaller}


def _smaller_frames(life: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a life's frames with lists in place of values by path. What is as in the frame before
    is null there."""
    paths = [tensor["path"] for tensor in life.get("begin", {}).get("tensors", [])]
    last_pictures: dict[int, tuple[Any, Any]] = {}  # a tensor's mosaic and limit
    frames = []
    for frame in life.get("frames", []):
        listed: dict[str, list[Any]] = {}
        for field in BY_TENSOR:
            if field in frame:
                listed[field] = [_rounded(frame[field].get(path), 3) for path in paths]
        pictures = [*zip(listed.get("mosaic", []), listed.get("limits", []))]
        for at, picture in enumerate(pictures):
            if last_pictures.get(at) == picture:
                listed["mosaic"][at] = None
                listed["limits"][at] = None
            last_pictures[at] = picture
        frames.append(frame | listed)
    return frames


def _fewer_steps(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(steps) > LINES:
        steps = [steps[place * (len(steps) - 1) // (LINES - 1)] for place in range(LINES)]
    return [{field: _rounded(value, 5) for field, value in line.items()} for line in steps]


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return value

"""Builds *Train it here*: one file with its script and library inside, in which a browser trains a model, asking no network."""

import re
from pathlib import Path

from engine.files import atomic_file


def write_train_page(folder: Path) -> Path:
    """Writes `folder`/train.html whole; returns its path. The library in it is text until somebody presses a button."""
    here = Path(__file__).parent

    def inside(match: re.Match[str]) -> str:
        tag, text = "style" if match[1] else "script", (here / (match[1] or match[2])).read_text("utf-8")
        return f"<{tag}>\n{text}</{tag}>"

    parts = r'<link rel="stylesheet" href="(../page.css)">|<script src="(\w+\.js)"></script>'
    html = re.sub(parts, inside, (here / "train.html").read_text("utf-8"))
    licence, library = ((here / "vendor" / name).read_text("utf-8") for name in ("LICENSE-jax", "jax.js"))
    html = html.replace('id="library">', f'id="library">\n/*\n{licence}*/\n{library}')
    with atomic_file(folder / "train.html") as file:
        file.write(html.encode())
    return folder / "train.html"

"""Joins the pages of this project: each is one HTML file with all that it needs inside.

The pages ask no network. Beside this file lie the style of all pages, and the shell of the site's,
with what draws their charts and tables.
"""

import re
from collections.abc import Callable
from pathlib import Path

SHELL = Path(__file__).parent / "shell.html"
PARTS = re.compile(r'<link rel="stylesheet" href="([./\w]+\.css)">|<script src="([./\w]+\.js)"></script>')

INDENT = re.compile(r"^[ \t]*(?://.*\n)?|  //.*$", re.MULTILINE)


def whole_page(path: Path, on_part: Callable[[str, str], None] | None = None) -> str:
    """Returns an HTML file with the styles and scripts inside that it names. Calls `on_part` with
    the tag and text of each.

    All but libraries comes without indentation and comments.
    """

    def inside(match: re.Match[str]) -> str:
        tag = "script"
        if match[1]:
            tag = "style"
        name = match[1] or match[2]
        text = "\n" + (path.parent / name).read_text("utf-8")
        if "vendor/" not in name:
            text = INDENT.sub("", text)
        if on_part:
            on_part(tag, text)
        return f"<{tag}>{text}</{tag}>"

    return PARTS.sub(inside, INDENT.sub("", path.read_text("utf-8")))

"""Joins the pages of this project: each is one HTML file with all that it needs inside.

The pages ask no network. Beside this file lie the style of all pages, and the shell of the site's,
with what draws their charts and tables.
"""

import re
from collections.abc import Callable
from pathlib import Path

SHELL = Path(__file__).parent / "shell.html"
PARTS = re.compile(r'<link rel="stylesheet" href="([./\w]+\.css)">|<script src="([./\w]+\.js)"></script>')

# What a style sheet can do without: spaces behind these signs and around braces, and the last semicolon.
STYLE_SPACE = re.compile(r"(?<=[:;,{]) +|;?\s*(?=})| +(?={)|\n+(?=\n)")
BLANK_LINES = re.compile(r"\n+(?=\n)")
INDENT = re.compile(r"^[ \t]*(?://.*\n)?|  //.*$", re.MULTILINE)


def whole_page(path: Path, on_part: Callable[[str, str], None] | None = None) -> str:
    """Returns an HTML file with the styles and scripts inside that it names. Calls `on_part` with
    the tag and text of each.

    All but libraries comes without indentation and comments, and styles without more spaces.
    """

    def inside(match: re.Match[str]) -> str:
        tag = "script"
        if match[1]:
            tag = "style"
        name = match[1] or match[2]
        text = "\n" + (path.parent / name).read_text("utf-8")
        if "vendor/" not in name:
            text = BLANK_LINES.sub("", INDENT.sub("", text))
        if tag == "style":
            text = STYLE_SPACE.sub("", text)
        if on_part:
            on_part(tag, text)
        return f"<{tag}>{text}</{tag}>"

    return PARTS.sub(inside, BLANK_LINES.sub("", INDENT.sub("", path.read_text("utf-8"))))

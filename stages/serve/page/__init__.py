"""Builds the chat page: one document with its style and scripts inside, and a policy under which nothing else can run.

Its parts lie beside this file and are joined when the server starts. The page asks for nothing but this server's routes.
"""

import base64
import hashlib
import re
from pathlib import Path

PARTS = re.compile(r'<link rel="stylesheet" href="(\w+\.css)">|<script src="([\w./]+\.js)"></script>')


def page() -> tuple[bytes, str]:
    """Reads and joins the parts; returns the page, UTF-8, and a Content-Security-Policy that allows each by its SHA-256."""
    folder = Path(__file__).parent
    allowed: dict[str, list[str]] = {"style": [], "script": []}

    def inside(match: re.Match[str]) -> str:
        tag = "style" if match[1] else "script"
        text = "\n" + (folder / (match[1] or match[2])).read_text("utf-8")
        allowed[tag].append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
        return f"<{tag}>{text}</{tag}>"

    html = PARTS.sub(inside, (folder / "page.html").read_text("utf-8"))
    policy = [
        "default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "img-src data:",  # the icon, inside the document
        "require-trusted-types-for 'script'", "trusted-types dompurify",  # only the sanitizer can make elements of text
        *(f"{tag}-src {' '.join(hashes)}" for tag, hashes in allowed.items()),
    ]  # fmt: skip
    return html.encode(), "; ".join(policy)

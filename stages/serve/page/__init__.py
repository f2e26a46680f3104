"""Builds the chat page: one document with style and scripts inside, and a policy against others.

Its parts lie beside this file, but for the style of all pages, and are joined when the server
starts. The page asks for nothing but this server's routes, among them those of LIBRARIES.
"""

import base64
import hashlib
import json
from pathlib import Path

from stages.runs.page import whole_page

FOLDER = Path(__file__).parent
# What the page fetches when it is first needed, for an answer that may have a formula or code to colour, or
# to export: the files by the names in their routes.
LIBRARIES = {
    "drawing.js": FOLDER / "drawing.js",
    "export.js": FOLDER / "export.js",
    "temml.min.js": FOLDER / "vendor" / "temml.min.js",
    "highlight.min.js": FOLDER / "vendor" / "highlight.min.js",
}
DIGESTS = "<!-- libraries -->"  # in the page: where their digests come


def page() -> tuple[bytes, str]:
    """Reads and joins the parts; returns the page, UTF-8, and a policy that allows each by its SHA-256."""
    hashes_by_tag: dict[str, list[str]] = {"style": [], "script": []}

    def allow(tag: str, text: str) -> None:
        hashes_by_tag[tag].append(f"'{_digest(text.encode())}'")

    html = whole_page(FOLDER / "page.html", allow)
    digests = {name: _digest(library(name)) for name in LIBRARIES}
    hashes_by_tag["script"] += [f"'{digest}'" for digest in digests.values()]
    html = html.replace(DIGESTS, json.dumps(digests))
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "img-src data:",  # the icon, inside the document
        "require-trusted-types-for 'script'",
        # Only the sanitizer can make elements of text, and only LIBRARIES can be loaded.
        "trusted-types dompurify libraries",
        *(f"{tag}-src {' '.join(hashes)}" for tag, hashes in hashes_by_tag.items()),
    ]
    return html.encode(), "; ".join(policy)


def library(name: str) -> bytes:
    """Returns one of LIBRARIES."""
    return LIBRARIES[name].read_bytes()


def _digest(content: bytes) -> str:
    """Returns a SHA-256 as policies and `integrity` have it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}"

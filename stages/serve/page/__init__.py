"""Builds the chat page: one document with style and scripts inside, and a policy against others.

Its parts lie beside this file, but for the style of all pages, and are joined when the server
starts. The page asks for nothing but this server's routes.
"""

import base64
import hashlib
from pathlib import Path

from stages.runs.page import whole_page


def page() -> tuple[bytes, str]:
    """Reads and joins the parts; returns the page, UTF-8, and a policy that allows each by its SHA-256."""
    folder = Path(__file__).parent
    hashes_by_tag: dict[str, list[str]] = {"style": [], "script": []}

    def allow(tag: str, text: str) -> None:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
        hashes_by_tag[tag].append(f"'sha256-{digest.decode()}'")

    html = whole_page(folder / "page.html", allow)
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "img-src data:",  # the icon, inside the document
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",  # only the sanitizer can make elements of text
        *(f"{tag}-src {' '.join(hashes)}" for tag, hashes in hashes_by_tag.items()),
    ]
    return html.encode(), "; ".join(policy)

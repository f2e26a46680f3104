"""The chat page as a document: nothing in it comes from elsewhere, nothing can be put into it, and everybody can read it."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stages.runs.page import SHELL
from stages.serve import page as package
from stages.serve.page import LIBRARIES, library, page

FOLDER = Path(package.__file__).parent
SHARED = SHELL.with_name("base.css")


class Tags(HTMLParser):
    """The start tags of a document, each with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def html():
    return page()[0].decode()


@pytest.fixture(scope="module")
def own():
    """The page's own parts, without its libraries."""
    return "".join(file.read_text() for file in FOLDER.glob("*.*") if file.suffix in (".html", ".css", ".js"))


@pytest.fixture(scope="module")
def tags(html):
    return Tags(html).tags


def test_it_is_one_small_document(html, tags):
    assert len(html.encode()) < 128_000
    names = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(names) == len(set(names))


def test_its_libraries_are_as_released():
    vendor = FOLDER / "vendor"
    rows = re.findall(
        r"\| `(\S+)` \| ([\w.]+) \| ([\d.]+) \|.*\| `(\w{64})` \|", (vendor / "README.md").read_text()
    )
    assert {name for name, *_ in rows} == {file.name for file in vendor.glob("*.js")}
    for name, package_name, version, digest in rows:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
        # at its begin, or where it tells its version
        assert re.search(rf"\bv?{re.escape(version)}\b", (vendor / name).read_text())
        assert (vendor / f"LICENSE-{package_name}").exists()


def test_it_asks_for_nothing_outside_itself(own, tags):
    # a name, not a place
    assert re.findall(r"https?://[^\s'\"]*", own) == ["http://www.w3.org/2000/svg"]
    links = [
        attrs[name]
        for _, attrs in tags
        for name in ("src", "href", "action", "srcset", "data")
        if name in attrs
    ]
    assert [link for link in links if not str(link).startswith("data:image/svg+xml,")] == []
    assert not re.search(r"@import|url\(|\bimport\(|//cdn", own)
    routes = set(re.findall(r"(?<!\.)\b(?:get|post)\('([^']+)'", own))
    assert routes == {"/v1/chat/completions", "/v1/models", "/v1/attestation", "/tokenize", "/health"}
    assert own.count("fetch(") == 1  # `get` has it


def test_the_policy_allows_exactly_the_parts_inside_it(html):
    policy = dict(part.split(" ", 1) for part in page()[1].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert (policy["trusted-types"], policy["require-trusted-types-for"]) == (
        "dompurify libraries",
        "'script'",
    )
    for tag in ("style", "script"):
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        if tag == "style":
            files = [SHARED, *FOLDER.rglob("*.css")]
            fetched = []
        else:
            files = [file for file in FOLDER.rglob("*.js") if file.name not in LIBRARIES]
            fetched = [library(name) for name in LIBRARIES]
        assert len(parts) == len(files)
        allowed = [*(part.encode() for part in parts), *fetched]
        hashes = [base64.b64encode(hashlib.sha256(each).digest()).decode() for each in allowed]
        assert policy[f"{tag}-src"].split() == [f"'sha256-{each}'" for each in hashes]


def test_no_text_can_become_html_and_no_handler_or_style_is_an_attribute(own, tags):
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser", own
    )
    assert not [name for _, attrs in tags for name in attrs if name == "style" or name.startswith("on")]


def test_every_field_and_button_has_a_name(html, tags):
    labelled = {attrs["for"] for tag, attrs in tags if tag == "label" and "for" in attrs}
    wrapped = re.findall(r"<label>\w[^<]*<(?:input|textarea) name=\"(\w+)\"", html)
    for tag, attrs in tags:
        if tag in ("input", "textarea"):
            assert attrs.get("id") in labelled or attrs.get("name") in wrapped, attrs
    assert not re.search(r"<button[^>]*>\s*</button>", html)


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2, section 1.4.3)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(theme):
    themes = [
        re.findall(r":root \{(.*?)\}", path.read_text(), re.DOTALL) for path in (SHARED, FOLDER / "page.css")
    ]
    named = " ".join(light if theme == "light" else dark for light, dark in themes)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", named))
    text = [(ink, back) for ink in ("ink", "soft") for back in ("page", "faint", "shade")]
    text += [
        ("good", "faint"),
        ("good", "page"),
        ("bad", "faint"),
        ("bad", "bad-back"),
        ("on-link", "link"),
        ("link", "page"),
    ]
    edges = [("edge", "page"), ("edge", "faint"), ("link", "shade"), ("link", "faint")]
    for (front, back), least in [*((pair, 4.5) for pair in text), *((pair, 3.0) for pair in edges)]:
        darker, lighter = sorted(_luminance(colours[name]) for name in (front, back))
        assert (lighter + 0.05) / (darker + 0.05) >= least, (front, back)

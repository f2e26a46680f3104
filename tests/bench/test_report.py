import itertools
import json
import os
import re
import stat
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench.report.charts import decade_ticks, even_ticks, logarithmic, separate
from bench.report.page import page, write_report
from engine.errors import UserError

# A made-up stage table with every kind of row: the shape of what `python -m bench` measures, not a measurement.
TABLE = (Path(__file__).parent / "stage_table.json").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br", "input"}


def document():
    """A new document each time, so that a test may change it."""
    return json.loads(TABLE)


class Reader(HTMLParser):
    """The text of a page by element, the tags, and whether each is closed where it should be."""

    def __init__(self, source):
        super().__init__()
        self.open, self.faults, self.tags, self.text = [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        if not {"style", "title", "pre"} & set(self.open):
            self.text.append(data)

    def page_text(self):
        return " ".join(" ".join(self.text).split())


def drawings(source):
    return [ET.fromstring(result) for result in re.findall(r"<svg .*?</svg>", source, flags=re.DOTALL)]


def points_of(path):
    return [tuple(map(float, pair.split())) for pair in re.split("[MLZ]", path) if pair]


def of_class(root, tag, name):
    return [element for element in root.iter(SVG + tag) if element.get("class") == name]


def test_a_page_is_well_formed_and_its_identifiers_are_its_own():
    reader = Reader(page(document()))
    assert (reader.faults, reader.open) == ([], [])
    names = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(names)
    labels = [name for _, attributes in reader.tags for name in attributes.get("aria-labelledby", "").split()]
    assert set(labels) <= set(names)


def test_the_file_needs_nothing_else(tmp_path):
    source = write_report(tmp_path, document()).read_text(encoding="utf-8")
    assert not re.search(r"(?i)https?:", source.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(r"(?i)<(script|link|img|iframe|object|embed)\b|@import|url\(|\bsrc=|\son\w+=", source)


def test_every_row_claim_note_and_command_is_said():
    doc = document()
    reader = Reader(page(doc))
    page_text = reader.page_text()
    for row in doc["rows"]:
        assert row["name"] in page_text
        if row["explanation"]:
            assert row["explanation"] in page_text
    for claim in doc["claims"]:
        assert claim["claim"] in page_text
        assert claim["verdict"] in page_text
        assert claim["value"] is None or str(claim["value"]) in page_text
    assert page_text.count(f"Regenerate: {doc['command']}") == 2 + 3 + 1  # table and claims, three figures, method
    assert doc["noise"] in page_text


@pytest.mark.parametrize("place", ["row", "claim", "verdict", "value", "explanation", "model", "device", "command", "series"])
def test_text_from_outside_stays_text(place):
    doc, nasty = document(), "<b onclick='x'>\"&amp;</title></svg>"
    row, decode = doc["rows"][0], next(row for row in doc["rows"] if row["slots"])
    if place == "row":
        row["name"] = decode["name"] = nasty
    elif place == "model":
        doc["model"]["name"] = nasty
    else:
        owners = {"explanation": decode, "series": decode, "device": doc["machine"], "command": doc}
        owners.get(place, doc["claims"][0])[place] = nasty
    reader = Reader(page(doc))
    assert reader.faults == []
    assert not any(tag == "b" and attributes for tag, attributes in reader.tags)
    assert nasty in reader.page_text() or place in ("series", "command")
    texts = "".join("".join(root.itertext()) for root in drawings(page(doc)))
    assert nasty in texts or place not in ("row", "series")


def test_each_drawing_is_xml_that_names_and_describes_itself_and_stays_within_its_frame():
    numbers = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy"}
    result = drawings(page(document()))
    assert len(result) == 6
    for root in result:
        title, description = root[0], root[1]
        assert (title.tag, description.tag) == (f"{SVG}title", f"{SVG}desc")
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert title.text
        assert len(description.text) > 30
        _, _, width, height = map(float, root.get("viewBox").split())
        for element in root.iter():
            for name in numbers & set(element.keys()):
                limit = height if "y" in name else width
                assert -0.01 <= float(element.get(name)) <= limit + 0.01, ET.tostring(element)
            if element.tag == f"{SVG}path":
                points = points_of(element.get("d"))
                assert all(-0.01 <= x <= width + 0.01 and -0.01 <= y <= height + 0.01 for x, y in points), ET.tostring(element)


def bar_widths(root):
    """Name of a row -> {colour: width}."""
    result = {}
    for group in root.iter(f"{SVG}g"):
        rectangles, texts = group.findall(f"{SVG}rect"), group.findall(f"{SVG}text")
        if rectangles and len(texts) == 3:
            result[texts[0].text] = {each.get("class"): float(each.get("width")) for each in rectangles}
    return result


def test_bars_are_as_long_as_their_numbers():
    bars = bar_widths(drawings(page(document()))[0])
    assert len(bars) == len(document()["rows"])
    unit = bars["evaluation forward"]["blue"]
    assert bars["pre-training step"] == pytest.approx(
        {"blue": unit, "amber": unit, "rust": unit, "grey": max(0.6, 0.004 * unit)}, abs=0.02
    )
    assert bars["bottom half frozen"]["amber"] == pytest.approx(unit / 2, abs=0.02)
    assert set(bars["decode, 8 slots"]) == {"blue"}


def test_ceilings_lie_where_bytes_and_operations_put_them():
    """A machine on which 8 slots take exactly what reading takes: dot and line meet."""
    doc = document()
    row = next(row for row in doc["rows"] if row["slots"] == 8)
    row["seconds_per_token"] = row["bytes_per_token"] / (doc["ceilings"]["read_gbs"] * 1e9)
    root = drawings(page(doc))[2]
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in of_class(root, "circle", "dot way0")]
    (line,) = of_class(root, "path", "line memory")
    points = points_of(line.get("d"))
    (x0, y0), (x1, y1) = next((a, b) for a, b in itertools.pairwise(points) if a[0] <= dots[1][0] <= b[0])
    assert y0 + (dots[1][0] - x0) / (x1 - x0) * (y1 - y0) == pytest.approx(dots[1][1], abs=0.5)
    assert dots[0][1] < dots[1][1] < dots[2][1]


def emptied(value):
    if isinstance(value, dict):
        return {name: inside if name in ("name", "claim", "verdict") else emptied(inside) for name, inside in value.items()}
    return [emptied(each) for each in value] if isinstance(value, list) else None


def without(value, missing):
    """The document with one key gone wherever it stands."""
    if isinstance(value, dict):
        return {name: without(inside, missing) for name, inside in value.items() if name != missing}
    return [without(each, missing) for each in value] if isinstance(value, list) else value


def keys(value):
    if isinstance(value, dict):
        return set(value) | {name for inside in value.values() for name in keys(inside)}
    return {name for each in value for name in keys(each)} if isinstance(value, list) else set()


def test_what_is_missing_is_a_dash_or_left_out():
    for doc in ({}, {"rows": []}, emptied(document())):
        reader = Reader(page(doc))
        assert (reader.faults, reader.open) == ([], [])
        assert not drawings(page(doc))
        assert "None" not in reader.page_text()
        assert "nan" not in reader.page_text()
    assert "pre-training step" in reader.page_text()


@pytest.mark.parametrize("missing", sorted(keys(document()) - {"name", "claim", "verdict"}))
def test_any_one_number_may_be_missing(missing):
    reader = Reader(page(without(document(), missing)))
    assert (reader.faults, reader.open) == ([], [])
    assert "None" not in reader.page_text()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0, -1.0, "much", True])
@pytest.mark.parametrize(
    "name", ["seconds_per_token", "usd_per_million_tokens", "peak_bytes", "slots", "flop_ratio_to_forward", "spread"]
)
def test_odd_numbers_do_not_break_the_page(name, odd):
    doc = document()
    for rows in (doc["rows"][-1:], doc["rows"]):
        for row in rows:
            row[name] = odd
        assert Reader(page(doc)).faults == []


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [
        ("true", "holds"), ("True, on this machine", "holds"), ("false: a third", "fails"), ("undecided: x", "open"),
        ("partly: little", "partly"), ("depends", "partly"), ("", "partly"),
    ],
)  # fmt: skip
def test_a_verdict_in_words_has_a_mark(verdict, kind):
    source = page({"claims": [{"claim": "a", "verdict": verdict}]})
    assert f'<li class="{kind}">' in source


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_report(tmp_path / "made" / "for it", document())
    assert path == tmp_path / "made" / "for it" / "report.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    before = path.read_bytes()
    assert before == write_report(tmp_path, document()).read_bytes(), "the same document makes the same bytes"
    assert len(before) < 200_000

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device. Choose another folder"):
        write_report(path.parent, {})
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"--out .*report.html cannot be written"):
        write_report(path, document())
    assert sorted(os.listdir(path.parent)) == ["passes.svg", "report.html", "stages.md", "stages.svg"]


def test_ticks_and_labels():
    assert even_ticks(3.0, 6) == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert even_ticks(240e6, 4) == [0, 1e8, 2e8]
    assert decade_ticks(0.9, 1100, 9) == [1, 10, 100, 1000]
    assert decade_ticks(15, 600, 9) == [20, 50, 100, 200, 500]
    for low in (1.0, 2.1, 4.9, 9.7):
        assert decade_ticks(low, 2.56 * low, 8), low
    assert separate([5, 6, 30], 10, 0, 100) == [5, 15, 30]
    assert separate([95, 96], 10, 0, 100) == [90, 100]
    assert separate([40, 10], 10, 0, 100) == [40, 10]
    assert logarithmic(1, 100, 0, 10)(10) == pytest.approx(5)


def test_the_first_figure_is_a_picture_of_its_own(tmp_path):
    write_report(tmp_path, document())
    source = (tmp_path / "stages.svg").read_text(encoding="utf-8")
    root = ET.fromstring(source)
    assert root.tag.endswith("svg")
    names = {leaf.text for leaf in root.iter() if leaf.tag.endswith("text")}
    assert {row["name"] for row in document()["rows"]} <= names
    style = next(leaf.text for leaf in root.iter() if leaf.tag.endswith("style"))
    assert "prefers-color-scheme: dark" in style
    for used in {leaf.get("class") for leaf in root.iter() if leaf.tag.endswith("rect")}:
        assert f"svg rect.{used}" in style
    assert len(source) < 30_000


def test_the_table_in_markdown_has_a_line_for_every_row_and_claim(tmp_path):
    doc = document()
    write_report(tmp_path, doc)
    lines = (tmp_path / "stages.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(doc["rows"])
    assert {line.count("|") for line in table} == {13}
    assert sum(line.startswith("- **") for line in lines) == len(doc["claims"])
    assert f"`uv run {doc['command']}`" in lines[0]

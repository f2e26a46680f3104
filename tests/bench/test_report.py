"""The page of the stage table in a browser, its pictures as files, and how pages of one folder name one another."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import terminal
from bench.__main__ import PARTS
from bench.models import random_model, tokens_for
from bench.pages import write_page
from bench.stages.report import print_stages, write_pictures
from bench.stages.residuals import block_residuals
from engine.errors import UserError
from engine.model.config import PRESETS
from stages.runs.watch.page import page_html

# a result of one day, without what --out adds to it
TABLE = (Path(__file__).parent / "kept" / "bench.json").read_text(encoding="utf-8")
KINDS = ("parameters", "optimizer state", "KV cache", "gradients", "residuals", "temporaries")
NASTY = "<b onclick='x'>\"&amp;</title></script></svg>"


@pytest.mark.parametrize("width", [80, 160])
def test_a_narrow_terminal_cuts_no_figure(width, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "PIPED_WIDTH", width)
    print_stages(json.loads(TABLE))
    output = capsys.readouterr().out
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= width


@pytest.fixture(scope="module")
def pictures():
    """What --out adds to the table's document."""
    model = random_model("tiny", PRESETS["tiny"])
    bytes = {kind: [1000, 3000, 2000] for kind in KINDS}
    return {
        "memory": {
            "pre-training step": {"bytes": bytes, "backward": 1, "update": 2, "xla": 20000},
            "prefill": {
                "bytes": {kind: [size // 9 for size in sizes] for kind, sizes in bytes.items()},
                "xla": 2000,
            },
        },
        "learning": {
            "readings": [1, 4, 16],
            "text": [2.1, 1.8, 0.8],
            "other": [2.3, 2.1, 2.6],
            "letters": 11_264,
            "other_letters": 9_600,
            "pretrained": 307_200,
            "moved": {stage: {"all weights": 0.2, "head": 1.0} for stage in ("pre-training", "1", "16")},
        },
        "config": model.cfg.to_json(),
        "residuals": block_residuals(model.cfg, model.params, tokens_for(model, 2, 5)),
    }


@pytest.fixture
def document(pictures):
    """A new document each time, so that a test may change it."""
    document = json.loads(TABLE) | pictures
    document["rows"][0]["layers"] = document["rows"][2]["layers"] = [[4e6, 4e6, 4e6], [2e6, 2e6, 2e6]]
    return document


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of a document, and returns all of its text."""

    def show(document):
        path = tmp_path / "report.html"
        path.write_text(page_html(document, PARTS), encoding="utf-8")
        browser.get(path.as_uri())
        assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
        parts = browser.execute_script(
            "return ['#alert', 'header', 'main'].map((part) => document.querySelector(part).textContent)"
        )
        return " ".join(parts)

    return show


def test_every_row_and_claim_is_said_memory_first_and_residuals_last(document, show, browser):
    text = show(document)
    for row in document["rows"]:
        assert row["name"] in text
    for claim in document["claims"]:
        assert all(claim[part] in text for part in ("claim", "verdict", "value"))
    assert document["noise"] in text
    titles = [each.text for each in browser.find_elements("css selector", "h2")]
    assert titles[:2] == [
        "Training climbs and comes down; inference is flat",
        "Training takes 3.00 times the operations of a forward pass",
    ]
    assert titles[-1].startswith("For experts")
    assert "Read too often, a text is learned by heart" in titles
    assert "Pre-training moved the weights by 20%, fine-tuning by 20% in one reading" in titles
    assert len(titles) == 12
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert (
        len(browser.find_elements("xpath", "//b[starts-with(., 'An example')]"))
        == len(browser.find_elements("css selector", "clipPath"))
        == 4
    )


def test_the_switches_work_by_keyboard_on_a_phone_too(document, show, browser):
    from selenium.webdriver import Keys

    show(document)
    dropped = lambda: len(browser.find_elements("css selector", ".dropped"))
    assert dropped() == 0
    button = browser.find_element("xpath", "//button[starts-with(., 'gradient checkpointing')]")
    button.send_keys(Keys.ENTER)
    assert dropped() == len(document["residuals"]["rows"]) - 1  # the block's input is kept
    assert button.get_attribute("aria-pressed") == "true"
    for width in (360, 1280):
        browser.set_window_size(width, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), width


def test_bars_and_dots_lie_where_their_numbers_put_them(document, show, browser):
    show(document)
    widths = browser.execute_script(
        "return [...document.querySelectorAll('section:nth-of-type(2) .bars > div')].map((each) =>"
        " [...each.querySelectorAll('i')].map((part) => part.getBoundingClientRect().width))"
    )
    assert len(widths) == sum(row["flop_ratio_to_forward"] > 0 for row in document["rows"])
    forward, dx, dw, _ = widths[0]
    assert dx / forward == pytest.approx(
        document["rows"][0]["flops_per_token"]["dx"] / document["rows"][0]["flops_per_token"]["forward"],
        rel=0.02,
    )
    assert forward + dx + dw == pytest.approx(3 * widths[8][0], rel=0.02)
    axis = {"name": "x", "low": 1, "high": 10000}
    script = """const axis = {...arguments[0], format: String};
    const chart = logChart(600, '', axis, axis, {dots: arguments[1].map((at) => ({at, kind: 'way0', text: '7'}))});
    const numbers = (each) => ['cx', 'cy', 'x', 'y'].map((name) => +each.getAttribute(name));
    return ['circle', 'text'].map((tag) => [...chart.querySelectorAll(tag)].map(numbers));"""
    dots, texts = browser.execute_script(script, axis, [[10, 10], [100, 1000], [110, 1000]])
    (x0, y0), (x1, y1), (x2, y2) = (dot[:2] for dot in dots)
    assert (x1 - x0) / (x2 - x1) == pytest.approx(1 / math.log10(1.1), rel=0.01)
    assert y1 == y2 < y0
    near, far = texts[-2][2:], texts[-1][2:]
    assert math.dist(near, far) > 12, "no text covers another"
    assert browser.execute_script("return [logTicks(0.9, 1100, 9), logTicks(15, 600, 9)]") == [
        [1, 10, 100, 1000],
        [20, 50, 100, 200, 500],
    ]


def test_text_from_outside_stays_text(document, show, browser):
    row = document["rows"][0]
    row["name"] = row["bound_by"] = document["model"]["name"] = document["command"] = document["noise"] = (
        NASTY
    )
    document["claims"][0] = dict.fromkeys(("claim", "verdict", "value", "command"), NASTY)
    assert show(document).count(NASTY) >= 9
    assert browser.find_elements("css selector", "[onclick]") == []


def emptied(value):
    if isinstance(value, dict):
        return {
            name: inside if name in ("name", "claim", "verdict") else emptied(inside)
            for name, inside in value.items()
        }
    return [emptied(each) for each in value] if isinstance(value, list) else None


def without(value, missing):
    """The document with one key gone wherever it stands."""
    if isinstance(value, dict):
        return {name: without(inside, missing) for name, inside in value.items() if name != missing}
    return [without(each, missing) for each in value] if isinstance(value, list) else value


@pytest.mark.whole
def test_what_is_missing_is_a_dash_or_left_out(document, show):
    assert "holds no stage table" in show({})
    assert "holds no stage table" in show({"rows": []})
    table = json.loads(TABLE)
    keys = {
        *table,
        *table["rows"][0],
        *table["rows"][0]["flops_per_token"],
        *table["ceilings"],
        *table["model"],
    } - {
        "rows",
        "name",
    }
    for each in (emptied(table), *(without(table, key) for key in sorted(keys))):
        text = show(each)
        assert "pre-training step" in text
        assert [word for word in ("undefined", "NaN", "null", "Infinity", "[object") if word in text] == []


def test_the_pictures_are_files_of_their_own(tmp_path):
    document = json.loads(TABLE)
    write_pictures(tmp_path, document)
    for name, words in (
        ("stages.svg", {row["name"] for row in document["rows"]}),
        ("passes.svg", {"training", "inference"}),
    ):
        source = (tmp_path / name).read_text(encoding="utf-8")
        root = ET.fromstring(source)
        assert words <= {leaf.text for leaf in root.iter() if leaf.tag.endswith("text")}
        assert "prefers-color-scheme: dark" in source
        assert len(source) < 30_000


def test_pages_of_one_folder_name_one_another(tmp_path):
    source = tmp_path / "bench.json"
    source.write_text(TABLE, encoding="utf-8")
    first = write_page(source, "report.html", *PARTS)
    assert "href=" not in first.read_text().partition("</nav>")[0].rpartition("<nav")[2]
    (tmp_path / "lives.html").write_text("of another program")
    write_page(source, "plan.html", *PARTS)
    for name in ("report.html", "plan.html"):
        nav = (tmp_path / name).read_text().partition("</nav>")[0].rpartition("<nav")[2]
        assert nav.count("<a href=") == 3
        assert f'href="{name}" aria-current="page"' in nav
    assert (tmp_path / "lives.html").read_text() == "of another program"
    source.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"bench\.json"):
        write_page(source, "report.html", *PARTS)

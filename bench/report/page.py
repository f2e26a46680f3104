"""The stage table as a page: one file that holds all it shows, for a screen of any width, light or dark, and for paper."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.report.figures import Figure, decode_figure, decoding, flops_figure, life_figure, memory_figure, training
from bench.report.markdown import markdown
from bench.report.stage_rows import again, stages_section
from bench.table.claims import GENERATED_CHEAPER
from engine.errors import UserError
from engine.files import whole_file
from engine.format import in_words, money, number, si, times

Document = Mapping[str, Any]


def write_report(folder: Path, document: Document) -> Path:
    """Writes the stage table's document to `folder`/report.html, each file whole or not at all; returns that path.

    Beside it lie what another page may carry: the first figure, stages.svg, and table and claims in Markdown, stages.md.

    Rows, claims and their fields may be absent or None: what has no number is a dash, a figure without numbers is left out.
    Raises UserError when the folder cannot be made or written.
    """
    files = {"report.html": page(document)}
    if "command" in document:
        files["stages.md"] = markdown(document)
    if figure := flops_figure(document.get("rows") or []):
        files["stages.svg"] = picture(figure.wide)
    try:
        for name, content in files.items():
            with whole_file(folder / name) as file:
                file.write(content.encode())
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}. Choose another folder.") from error
    return folder / "report.html"


def picture(drawn: str) -> str:
    """A drawing of the page as a file of its own: the page's colours, light and dark, and its rules for drawings go along."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    colours, _ = style.split("* {", 1)
    rules = [line for line in style.splitlines() if line.startswith("svg")]
    inside = "\n".join([colours.strip(), *rules, "svg { background: var(--page); }"])
    opening, rest = drawn.split(">", 1)
    return f"{opening}>\n<style>\n{inside}\n</style>{rest}\n"


def page(document: Document) -> str:
    """The whole HTML of the report."""
    rows, model, ceilings = document.get("rows") or [], document.get("model") or {}, document.get("ceilings") or {}
    command = document.get("command") or ""
    figures = [
        flops_figure(rows),
        decode_figure(rows, ceilings, model),
        memory_figure(rows),
        life_figure(rows, model, document.get("life") or {}),
    ]
    sections = [
        _header(model, document.get("machine") or {}),
        _glance(rows, document.get("claims") or []),
        stages_section(rows, command, document.get("price_per_hour")),
        _claims(document.get("claims") or [], command),
        _figures([figure for figure in figures if figure], command),
        _method(document, command),
    ]
    title = " · ".join(["What each stage costs", *filter(None, [_text(model.get("name"))])])
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{title}</title>",
        f"<style>\n{style}</style>",
    ]
    body = "\n".join(filter(None, sections))
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        *head,
        "</head>",
        "<body>",
        "<main>",
        body,
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _header(model: Document, machine: Document) -> str:
    params, cores, jax = number(model.get("params")), number(machine.get("cores")), machine.get("jax")
    about = [model.get("name"), params and f"{in_words(params)} parameters"]
    where = [machine.get("device"), cores and f"{cores:g} {'core' if cores == 1 else 'cores'}", jax and f"JAX {jax}"]
    lines = [" · ".join(_text(part) for part in parts if part) for parts in (about, where)]
    subtitle = "<br>".join(filter(None, lines))
    return f'<header><p class="kicker">Thrice</p><h1>What each stage costs</h1><p class="subtitle">{subtitle}</p></header>'


def _glance(rows: Sequence[Document], claims: Sequence[Document]) -> str:
    """The few figures that the table is read for."""
    found: list[tuple[str, str]] = []
    trained = training(rows) or {}
    if number(trained.get("flop_ratio_to_forward")):
        found.append((times(trained["flop_ratio_to_forward"]), f"the operations of a forward pass: {trained['name']}"))
    if number(trained.get("time_ratio_to_forward")):
        found.append((times(trained["time_ratio_to_forward"]), "the time of a forward pass, optimizer included"))
    served = sorted((row for row in decoding(rows) if number(row.get("slots"))), key=lambda row: row["slots"])
    decided = (claim.get("numbers") or {} for claim in claims if claim.get("claim") == GENERATED_CHEAPER)
    lone = next(decided, {}).get("time")
    if served and number(lone):
        found.append((times(lone), f"the time of a token trained on: {served[0]['name']}"))
    priced = [row for row in served if number(row.get("usd_per_million_tokens"))]
    if len(priced) > 1:
        least, most = (money(row["usd_per_million_tokens"]) for row in (priced[-1], priced[0]))
        found.append((f"{least}–{most.removeprefix('$')}", f"a million tokens: {priced[-1]['name']}, or {priced[0]['name']}"))
    cells = "".join(f"<div><dt>{_text(words)}</dt><dd>{figure}</dd></div>" for figure, words in found)
    return f'<dl class="glance">{cells}</dl>' if found else ""


_MARKS = {"holds": "✓", "fails": "✗", "partly": "≈", "open": "?"}
_FIRST_WORDS = {
    "holds": ("true", "yes", "holds", "confirmed"),
    "fails": ("false", "no", "fails", "refuted", "wrong"),
    "open": ("open", "not", "unknown", "unmeasured", "too"),  # not measured, too noisy
}


def _kind(verdict: str) -> str:
    """Which of the four a verdict in words is, by its first word."""
    first = re.split(r"\W+", verdict.strip().lower(), maxsplit=1)[0]
    return next((kind for kind, words in _FIRST_WORDS.items() if first in words), "partly")


def _claims(claims: Sequence[Document], command: str) -> str:
    items = []
    for claim in claims:
        kind, value = _kind(str(claim["verdict"])), claim.get("value")
        said = si(value, "") if number(value) is not None else _text(value)
        own = claim.get("command")
        items.append(
            f'<li class="{kind}">'
            f'<p class="verdict"><span aria-hidden="true">{_MARKS[kind]}</span> {_text(claim["verdict"])}</p>'
            f'<div><p class="claim">{_text(claim["claim"])}</p>'
            + (f'<p class="value">{said}</p>' if said else "")
            + (again(own) if own != command else "")
            + "</div></li>"
        )
    if not items:
        return ""
    heading = '<h2 id="claims">What is said, and what was measured</h2>'
    return f'<section aria-labelledby="claims">{heading}<ul class="claims">{"".join(items)}</ul>{again(command)}</section>'


def _figures(figures: Sequence[Figure], command: str) -> str:
    if not figures:
        return ""
    drawn = "\n".join(
        f'<figure id="figure-{index}"><h3><span>Figure {index}.</span> {_text(figure.title)}</h3>'
        f"\n{figure.wide}\n{figure.narrow}\n"
        f"<figcaption><span>{_text(figure.caption)}</span> {again(command)}</figcaption></figure>"
        for index, figure in enumerate(figures, 1)
    )
    return f'<section aria-labelledby="figures"><h2 id="figures">Figures</h2>\n{drawn}\n</section>'


def _method(document: Document, command: str) -> str:
    units = {"gflops": "GFLOP/s", "gbs": "GB/s"}
    rates = []
    for name, value in (document.get("ceilings") or {}).items():
        what, _, unit = name.rpartition("_")
        if number(value) is not None:
            rates.append((what.replace("_", " ") or name, f"{value:,.4g} {units.get(unit, unit)}"))
    facts = [
        ("Machine", _facts(document.get("machine") or {})),
        ("Model", _facts(document.get("model") or {})),
        ("Ceilings, measured in this run", rates),
    ]
    lists = "".join(f"<div><h3>{title}</h3>{_pairs(inside)}</div>" for title, inside in facts if inside)
    created = document.get("created")
    said = [document.get("noise"), *(document.get("notes") or []), created and f"Made {created}."]
    notes = "".join(f"<p>{_text(line)}</p>" for line in said if line)
    whole = _text(json.dumps(document, indent=1, ensure_ascii=False, default=str))
    return (
        '<section aria-labelledby="method"><h2 id="method">How it was measured</h2>'
        f'<div class="facts">{lists}</div>{notes}{again(command)}'
        f"<details><summary>Every number, as JSON</summary><pre>{whole}</pre></details></section>"
    )


def _pairs(facts: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts) + "</dl>"


def _facts(found: Document) -> list[tuple[str, str]]:
    """What a mapping says in single values, large counts in words."""
    said = []
    for name, value in found.items():
        size = number(value)
        if size is not None and name.endswith("_bytes"):
            said.append((name.removesuffix("_bytes").replace("_", " "), si(value, "B")))
        elif size is not None or isinstance(value, str | bool):
            said.append((name.replace("_", " "), in_words(value) if size is not None and size >= 1e6 else str(value)))
    return said


def _text(value: Any) -> str:
    """The value as text of the page; nothing for None."""
    return "" if value is None else escape(str(value))

"""Shows what `bench.accelerator` measured: tables on the terminal, and one self-contained page."""

import json
from pathlib import Path

import jinja2

from bench.cli import Json, console, print_table
from bench.report.page import HERE as REPORT
from bench.timing import Ratio
from engine.errors import UserError
from engine.files import atomic_file
from engine.format import money, percent, si

HERE = Path(__file__).parent
CHECKS = ("check", "apart", "at most", "")
ROWS = ("", "weights", "a token takes", "tokens/s", "of ceiling", "goal", "peak", "compiled in", "$ a million")
PEERS = ("beside", "peer", "ours, tokens/s", "peer's", "our time over its")


def print_document(document: Json) -> None:
    """Prints checks, ceilings, tables, peers, and what was left out."""
    for title, heads, rows in sections(document):
        print_table(title, heads, rows)
    for line in remarks(document):
        console().print(line, markup=False)


def write_page(folder: Path, document: Json) -> Path:
    """Writes accelerator.html and accelerator.json, each whole or not at all, and returns the page's path.

    Raises UserError when the folder cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = json.dumps(document, indent=1)
    page = environment.get_template("page.html.j2").render(
        machine=document["machine"], sections=sections(document), remarks=remarks(document), json=text,
        style=(REPORT / "page.css").read_text(encoding="utf-8"),
    )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("accelerator.html", page), ("accelerator.json", text + "\n")):
            with atomic_file(folder / name) as file:
                file.write(content.encode())
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}. Choose another folder.") from error
    return folder / "accelerator.html"


def sections(document: Json) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Returns the title, heads and cells of each table."""
    number = lambda value: f"{value or 0:.2g}"
    checks = [
        [check["name"], number(check["difference"]), number(check["limit"]), "holds" if check["holds"] else "FAILS"]
        for check in document["checks"]
    ]
    tables = [(_title(table), ROWS, [_row(row) for row in table["rows"]]) for table in document["tables"]]
    peers = [
        [
            row["name"], row["peer"], f"{row['tokens_per_second']:,.0f}", f"{row['peer_tokens_per_second']:,.0f}",
            str(Ratio(row["ratio"], row["low"], row["high"])),
        ]
        for row in document["peers"]
    ]  # fmt: skip
    return [
        ("Correct: this device beside the processor", CHECKS, checks),
        *tables,
        *([("Peers", PEERS, peers)] if peers else []),
    ]


def remarks(document: Json) -> list[str]:
    """Returns the sentences below the tables."""
    ceilings, absent = document["ceilings"], document["absent"]
    rates = ", ".join(f"{name} {si(1e9 * ceilings[f'{name}_gflops'], 'FLOP/s')}" for name in ("bf16", "f32", "int8"))
    return [
        f"ceilings measured here: {rates}; memory read at {si(1e9 * ceilings['read_gbs'], 'B/s')}",
        *(f"{table['model']['name']}: {name} could not run: {why}" for table in document["tables"]
          for name, why in table["left_out"].items()),
        *(f"left out: {line}" for line in document["left_out"]),
        *(f"absent: {each['name']} ({each['reason']}); to have it: {each['install']}" for each in absent),
        *(table["noise"] for table in document["tables"]),
    ]  # fmt: skip


def _title(table: Json) -> str:
    model = table["model"]
    ways = [way for way in ("scan", "remat") if model[way] not in (False, "none")]
    return (
        f"{model['name']}, {model['params'] / 1e6:,.0f} M parameters, {model['batch']} x {model['context']} tokens"
        f"{', ' * bool(ways)}{' and '.join(ways)}"
    )


def _row(row: Json) -> list[str]:
    verdict = {True: "met", False: "NOT MET", None: "not known"}[row["met"]]
    goal = "" if row["goal"] is None else f"{percent(row['goal'])} {verdict}"
    return [
        row["name"], row["weights"], si(row["seconds_per_token"], "s"), f"{1 / row['seconds_per_token']:,.0f}",
        f"{percent(row['utilisation'])} {row['utilisation_of']}", goal, si(row["peak_bytes"], "B"),
        f"{row['compile_seconds']:.1f} s", money(row["usd_per_million_tokens"]),
    ]  # fmt: skip

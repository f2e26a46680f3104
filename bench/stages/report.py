"""Shows the stage table: printed with its claims, and as two pictures for READMEs."""

from pathlib import Path
from typing import Any

import jinja2

from bench.machine import Json
from bench.terminal import console, print_table
from engine import format
from engine.files import write_text
from engine.format import money, percent, si, times

PAGE = Path(__file__).parent / "page"


def print_stages(document: dict[str, Any]) -> None:
    """Prints the two tables and the claims."""
    out = console()
    rows = document["rows"]
    counted = ("", "weights", "formula", "walker", "elementwise", "XLA", "of forward")
    print_table("Counted: operations a token, by three counters", counted, map(_counted, rows), left=2)
    for why in dict.fromkeys(row["counters_differ"] for row in rows if row["counters_differ"]):
        names = ", ".join(row["name"] for row in rows if row["counters_differ"] == why)
        out.print(f"[bold]{names}[/]: {why}")
    measured = (
        "",
        "a token takes",
        "× forward",
        "peak",
        "predicted",
        "moved a token",
        "of ceiling",
        "bound by",
    )
    prices = ("$ a million", "$ a request")
    read, written = document["request_tokens"]
    price = money(document["price_per_hour"])
    title = f"Measured on this machine, at {price} an hour; a request: {read} tokens read, {written} written"
    print_table(title, measured + prices, map(_measured, rows))
    for claim in document["claims"]:
        out.print(f"[bold]{claim['claim']}[/]\n  [cyan]{claim['verdict']}[/]: {claim['value']}")
    out.print(f"\n{document['noise']}", markup=False)


def _counted(row: dict[str, Any]) -> list[str]:
    flops = row["flops_per_token"]
    walker = flops["walker"]
    elementwise = flops["walker_elementwise"]
    return [
        row["name"],
        row["weights"],
        si(flops["formula"], ""),
        "= formula" if walker == flops["formula"] else si(walker, ""),
        si(elementwise and round(elementwise), ""),
        si(flops["xla"], "") if row["counters_differ"] else "= walker",
        times(row["flop_ratio_to_forward"]),
    ]


def _measured(row: dict[str, Any]) -> list[str]:
    seconds = row["seconds_per_token"]
    return [
        row["name"],
        f"{si(seconds, 's')} ±{row['spread'] / seconds:.0%}",
        times(row["time_ratio_to_forward"]),
        si(row["peak_bytes"], "B"),
        si(row["predicted_peak_bytes"], "B"),
        si(row["bytes_per_token"], "B"),
        f"{percent(row['utilisation'])} {row['utilisation_of']}",
        row["bound_by"],
        money(row["usd_per_million_tokens"]),
        money(row["usd_per_request"]),
    ]


def write_pictures(folder: Path, document: Json) -> None:
    """Writes `folder`/stages.svg and passes.svg, each whole or not at all. They follow the reader's
    light or dark theme.
    """

    def write_number(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.2f}".rstrip("0").rstrip(".")
        return value

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.ChainableUndefined,
        finalize=write_number,
    )
    templates.filters |= {"times": format.times, "si": format.si}
    for name in ("stages.svg", "passes.svg"):
        write_text(folder / name, templates.get_template(f"{name}.j2").render(document))

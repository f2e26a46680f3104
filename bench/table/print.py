"""The stage table on a terminal: what each row costs in operations, what it costs here, and what follows from it."""

import os
import sys
from typing import Any

from engine.format import money, percent, si, times

# A pipe has no width of its own; the widest table fits in this.
PIPED_WIDTH = 140


def console() -> Any:
    """A rich console on stdout; where no one looks, a plain one that is wide enough for the tables."""
    from rich.console import Console

    terminal = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return Console(highlight=False, width=None if terminal else PIPED_WIDTH, force_terminal=terminal)


def show(document: dict[str, Any]) -> None:
    """Prints the two tables, the deviations in words, and the claims."""
    out = console()
    rows = document["rows"]
    out.print(_counted(rows))
    out.print(_measured(rows, document["price_per_hour"]))
    for row in rows:
        if row["why"]:
            out.print(f"[bold]{row['name']}[/], {_off(row)}: {row['why']}")
        if row["why_peak"]:
            out.print(f"[bold]{row['name']}[/], peak: {row['why_peak']}")
    out.print()
    for claim in document["claims"]:
        out.print(f"[bold]{claim['claim']}[/]\n  [cyan]{claim['verdict']}[/]: {claim['value']}")
    out.print(f"\n{document['noise']}", markup=False)


def _off(row: dict[str, Any]) -> str:
    predicted = row["predicted_seconds_per_token"]
    if not predicted:
        return "no FLOPs at all"
    return f"{percent(row['seconds_per_token'] / predicted - 1, signed=True)} against its FLOPs"


def _counted(rows: list[dict[str, Any]]) -> Any:
    table = _table("Counted: operations a token, by three counters")
    for name in ("", "weights"):
        table.add_column(name, no_wrap=not name)
    for name in ("formula", "walker", "elementwise", "XLA", "of forward"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        flops = row["flops_per_token"]
        formula = si(flops["formula"], "")
        others = flops["walker_elementwise"]
        walker = "= formula" if flops["walker"] == flops["formula"] else si(flops["walker"], "")
        table.add_row(
            row["name"], row["weights"], formula, walker if flops["walker"] is not None else "-",
            si(others and round(others), ""), si(flops["xla"], ""), times(row["flop_ratio_to_forward"]),
        )  # fmt: skip
    return table


def _measured(rows: list[dict[str, Any]], price: float) -> Any:
    table = _table(f"Measured: the same rows on this machine, at {money(price)} an hour")
    table.add_column("", no_wrap=True)
    heads = ("a token takes", "× forward", "by FLOPs", "peak", "predicted", "moved a token", "of ceiling", "$ a million")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        ratio = times(row["time_ratio_to_forward"]) if row["time_ratio_to_forward"] is not None else "noisy"
        share = row["utilisation"]
        spread = row["spread"] / row["seconds_per_token"]
        table.add_row(
            row["name"], f"{si(row['seconds_per_token'], 's')} ±{spread:.0%}", ratio, times(row["flop_ratio_to_forward"]),
            si(row["peak_bytes"], "B"), si(row["predicted_peak_bytes"], "B"), si(row["bytes_per_token"], "B"),
            "-" if share is None else f"{percent(share)} {row['utilisation_of']}", money(row["usd_per_million_tokens"]),
        )  # fmt: skip
    return table


def _table(title: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, title_style="bold")

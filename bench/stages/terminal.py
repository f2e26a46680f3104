"""Prints the stage table: each row's operations, its cost on this machine, claims and explanations."""

import statistics
from typing import Any

from bench.cli import console, print_table
from engine.format import money, percent, si, times


def print_stages(document: dict[str, Any]) -> None:
    """Prints the two tables, the claims, and the explanations."""
    out, rows = console(), document["rows"]
    counted = ("", "weights", "formula", "walker", "elementwise", "XLA", "of forward")
    print_table("Counted: operations a token, by three counters", counted, map(_counted, rows), left=2)
    measured = ("", "a token takes", "roofline", "× forward", "peak", "predicted", "moved a token", "of ceiling", "$ a million")
    title = f"Measured: the same rows on this machine, at {money(document['price_per_hour'])} an hour"
    print_table(title, measured, map(_measured, rows))
    for claim in document["claims"]:
        out.print(f"[bold]{claim['claim']}[/]\n  [cyan]{claim['verdict']}[/]: {claim['value']}")
    out.print()
    for row in rows:
        if row["explanation"]:
            predicted = row["predicted_seconds_per_token"]
            off = predicted and f"{percent(row['seconds_per_token'] / predicted - 1, signed=True)} against its FLOPs"
            out.print(f"[bold]{row['name']}[/], {off or 'no FLOPs at all'}: {row['explanation']}")
    pairs = [(row["roofline_seconds_per_token"], row["seconds_per_token"]) for row in rows]
    if errors := [abs(roofline / seconds - 1) for roofline, seconds in pairs if roofline]:
        half = f"half of the {len(errors)} rows within {statistics.median(errors):.0%} of what was measured"
        out.print(f"The roofline, from the forward pass's share of the ceiling and the memory's bytes, predicts {half}.")
    out.print(f"\n{document['noise']}", markup=False)


def _counted(row: dict[str, Any]) -> list[str]:
    flops = row["flops_per_token"]
    walker, elementwise = flops["walker"], flops["walker_elementwise"]
    return [
        row["name"], row["weights"], si(flops["formula"], ""),
        "= formula" if walker == flops["formula"] else si(walker, ""),
        si(elementwise and round(elementwise), ""), si(flops["xla"], ""), times(row["flop_ratio_to_forward"]),
    ]  # fmt: skip


def _measured(row: dict[str, Any]) -> list[str]:
    roofline, seconds = row["roofline_seconds_per_token"], row["seconds_per_token"]
    return [
        row["name"], f"{si(seconds, 's')} ±{row['spread'] / seconds:.0%}",
        percent(roofline and roofline / seconds - 1, signed=True), times(row["time_ratio_to_forward"]),
        si(row["peak_bytes"], "B"), si(row["predicted_peak_bytes"], "B"),
        si(row["bytes_per_token"], "B"), f"{percent(row['utilisation'])} {row['utilisation_of']}",
        money(row["usd_per_million_tokens"]),
    ]  # fmt: skip

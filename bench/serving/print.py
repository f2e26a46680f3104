"""Prints what was measured of the server as tables."""

from typing import Any

from bench.cli import console, table
from engine.format import money, si


def print_tables(document: dict[str, Any]) -> None:
    """Prints the document of `bench.serving`; a bar that is not met says so."""
    ready, serving = document["ready_seconds"], document["throughput"]
    print(f"{document['model']}, {document['weights']} weights, {document['slots']} slots, on {document['device']}")
    print(f"ready after {ready:.1f} s, at most {document['ready_bar']:g}{_unmet(document['ready_met'])}; the first time after "
          f"{document['first_ready_seconds']:.1f} s; {si(document['resident_bytes'], 'B')} of memory\n")  # fmt: skip
    _print_table("Throughput in a closed loop", ("streams", "tokens/s", "$ a million"), [
        (str(row["streams"]), f"{row['tokens_per_second']:.0f}", money(row["usd_per_million_tokens"])) for row in serving
    ])  # fmt: skip
    _print_table("The server against its own engine", ("", "server, tokens/s", "engine, tokens/s", "share", "at least"), [
        (row["name"], f"{row['tokens_per_second']:.0f}", f"{row['peer_tokens_per_second']:.0f}",
         f"{row['ratio']:.2f} ± {row['spread']:.2f}", f"{row['bar']}{_unmet(row['met'])}")
        for row in document["rows"]
    ])  # fmt: skip
    rate = document["saturated"]["requests_per_second"]
    heads = ("load", "answered", "tokens/s", "TTFT p50", "p99", "inter-token p50", "p99")
    _print_table(f"Latency in an open loop (Poisson arrivals); saturated at {rate:.1f} requests/s of the mix", heads, [
        (f"{row['load']:.0%}", f"{row['answered']} of {row['requests']}", f"{row['tokens_per_second']:.0f}",
         *(si(row[name], "s") for name in ("ttft_p50", "ttft_p99", "token_p50", "token_p99")))
        for row in document["load"]
    ])  # fmt: skip
    _print_table("What each part brings", ("", "measured", "on", "off", "gain"), [
        (row["part"], row["measured"], f"{row['on']:.3g}", f"{row['off']:.3g}", f"{row['gain']:.2f}x")
        for row in document["parts"]
    ])  # fmt: skip


def _unmet(met: bool) -> str:
    return "" if met else "   ** not met **"


def _print_table(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    console().print(table(title, heads, rows))

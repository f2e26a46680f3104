"""Rows that compare us with a peer: for the JSON document, and printed."""

from collections.abc import Mapping

from bench.cli import Json
from bench.timing import Timing, ratio

OURS = "ours"
SHORT = 64  # tokens of a prompt in the decode rows


def comparison(name: str, peer: str, timings: Mapping[str, Timing], tokens: int) -> Json:
    """Returns the row of one comparison; `ratio` is None, and `noisy` says why, where noise hides it."""
    ours, theirs = timings[OURS], timings[peer]
    return {
        "name": name, "peer": peer, "ours_seconds": ours.median, "peer_seconds": theirs.median,
        "best_ratio": min(ours.seconds) / min(theirs.seconds),
        "tokens_per_second": tokens / ours.median, "peer_tokens_per_second": tokens / theirs.median,
    } | ratio(ours, theirs).fields()  # fmt: skip


def add_row(rows: list[Json], row: Json, note: str) -> None:
    rows.append(row)
    ratio = f"{row['ratio']:5.2f} ± {row['spread']:.2f}" if row["ratio"] else "lost in noise"
    ours, theirs = row["tokens_per_second"], row["peer_tokens_per_second"]
    print(f"{row['name']:<27} {ours:7.0f} tokens/s, {row['peer']:<14} {theirs:7.0f}; ratio {ratio:<13} {note}", flush=True)

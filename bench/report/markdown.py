"""The stage table and the claims as Markdown, for a page that carries a real run: the README's front page."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.format import ABSENT, in_words, money, percent, si, times

Document = Mapping[str, Any]

HEADS = (
    "", "weights", "FLOPs a token", "walker", "XLA", "× forward", "time a token", "× forward", "peak", "bytes a token",
    "of ceiling", "$ a million",
)  # fmt: skip


def markdown(document: Document) -> str:
    """Where it was measured and how to do it again, the table, the claims, and how far to trust them."""
    model, machine = document["model"], document["machine"]
    where = (
        f"`{model['name']}`, {in_words(model['params'])} parameters, {model['dtype']}, batches of {model['batch']} × "
        f"{model['context']} tokens; {machine['device']}, {machine['cores']} cores, JAX {machine['jax']}; "
        f"{money(document['price_per_hour'])} an hour. `uv run {document['command']}`"
    )
    lines = [where, "", _line(HEADS), _line(["---", "---", *["---:"] * (len(HEADS) - 2)])]
    lines += [_line(_cells(row)) for row in document["rows"]]
    lines += ["", *(f"- **{claim['claim']}** {claim['verdict']}: {claim['value']}" for claim in document["claims"])]
    return "\n".join([*lines, "", document["noise"]]) + "\n"


def _cells(row: Document) -> list[str]:
    flops = row["flops_per_token"]
    walker = "=" if flops["walker"] == flops["formula"] else si(flops["walker"], "")
    ratio = "noisy" if row["time_ratio_to_forward"] is None else times(row["time_ratio_to_forward"])
    spread = f"{row['spread'] / row['seconds_per_token']:.0%}"
    used = ABSENT if row["utilisation"] is None else f"{percent(row['utilisation'])} {row['utilisation_of']}"
    return [
        row["name"], row["weights"], si(flops["formula"], ""), walker, si(flops["xla"], ""),
        times(row["flop_ratio_to_forward"]), f"{si(row['seconds_per_token'], 's')} ± {spread}", ratio,
        si(row["peak_bytes"], "B"), si(row["bytes_per_token"], "B"), used, money(row["usd_per_million_tokens"]),
    ]  # fmt: skip


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

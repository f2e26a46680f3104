"""Makes the three figures of the report: operations by stage, time by batch, and cost over a model's life.

Each is laid out for a page and for a phone, so that text keeps its size. A figure without numbers is None. Captions are in
`page.html.j2`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from bench.cli import Json
from bench.report.charts import Axis, Bar, Line, curves, stacked_bars
from bench.stages.claims import TOKENS_PER_PARAMETER
from engine.format import above_zero, in_words, money, si, times

_PARTS = (
    ("forward", "forward", "blue"), ("dx", "backward, dX", "amber"), ("dw", "backward, dW", "rust"),
    ("optimizer", "optimizer", "grey"),
)  # fmt: skip
CEILING_OF = {"float32": "f32_gflops", "int8": "int8_gflops"}  # other number types have the bfloat16 one

Rows = Sequence[Json]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure: the numbers of its caption, and its chart's layout, wide for a page or narrow for a phone."""

    id: str
    numbers: dict[str, Any]
    chart: Callable[[bool], dict[str, Any]]


def figures(rows: Rows, ceilings: Json, model: Json) -> list[Figure]:
    """Returns those of the three figures that the rows have numbers for."""
    every = flops_figure(rows), decode_figure(rows, ceilings, model), lifetime_cost_figure(rows, model)
    return list(filter(None, every))


def flops_figure(rows: Rows) -> Figure | None:
    """Draws the FLOPs per token of each stage in forward passes, stacked: forward, dX, dW, optimizer."""
    bars = []
    for row in rows:
        whole, ratio = _flops(row, "formula"), above_zero(row.get("flop_ratio_to_forward"))
        # The forward pass of the row's ratio; without a ratio, the row's own.
        if unit := whole / ratio if whole and ratio else _flops(row, "forward"):
            parts = tuple((colour, name, (_flops(row, key) or 0.0) / unit) for key, name, colour in _PARTS)
            if products := sum(size for _, _, size in parts[:3]):
                bars.append(Bar(row["name"], row.get("stage"), parts, (times(products), si(products * unit, "FLOP"))))
    if not bars:
        return None
    key = [(colour, name) for _, name, colour in _PARTS]
    longest = max(bars, key=lambda bar: bar.length)
    return Figure("flops", {"longest": longest}, lambda wide: stacked_bars(bars, key, lambda value: f"{value:g}×", wide))


def decode_figure(rows: Rows, ceilings: Json, model: Json) -> Figure | None:
    """Draws the time per token against slots, both logarithmic, above the floors of memory and compute."""
    served = [row for row in decode_rows(rows) if above_zero(row.get("slots")) and above_zero(row.get("seconds_per_token"))]
    if not served:
        return None
    series: dict[str, list[Json]] = {}
    for row in served:
        series.setdefault(row.get("series") or "decode", []).append(row)
    lines = []
    for rank, (name, ways) in enumerate(series.items()):
        ways.sort(key=lambda row: row["slots"])
        points = tuple((float(row["slots"]), float(row["seconds_per_token"])) for row in ways)
        spreads = tuple(above_zero(row.get("spread")) or 0.0 for row in ways)
        lines.append(Line(points, f"way{min(rank, 4)}", f"{name}, measured", "", spreads, below=rank > 0))
    first_series = next(iter(series.values()))
    reading, computing = _memory_floor(first_series, ceilings), _compute_floor(first_series, ceilings, model)
    trained = first_training_row(rows) or {}
    lowest = lambda slots: max(reading(slots) if reading else 0.0, computing[0] if computing else 0.0)
    beaten = any(seconds < lowest(slots) for line in lines for slots, seconds in line.points)
    slots = sorted({float(row["slots"]) for row in served})

    def chart(wide: bool) -> dict[str, Any]:
        low, high = slots[0] / 1.15, slots[-1] * (1.2 if wide else 1.9)  # a phone has no margin
        steps = [low * (high / low) ** (index / 32) for index in range(33)]
        level = lambda seconds: ((low, seconds), (high, seconds))
        every = list(lines)
        if seconds := above_zero(trained.get("seconds_per_token")):
            every.append(Line(level(seconds), "reference", trained["name"], f"{si(seconds, 's')} a token"))
        if reading:
            note = f"its bytes at {ceilings['read_gbs']:.3g} GB/s"
            every.append(Line(tuple((x, reading(x)) for x in steps), "memory", "memory ceiling", note))
        if computing:
            every.append(Line(level(computing[0]), "compute", "compute ceiling", f"its FLOPs at {computing[1]:.3g} GFLOP/s"))
        heights = [y for line in every for _, y in line.points]
        doublings = tuple(sorted({2.0**power for power in range(12) if slots[0] <= 2.0**power <= slots[-1]} | set(slots)))
        x_axis = Axis("slots (requests decoded together)", low, high, lambda value: f"{value:g}", doublings)
        y_axis = Axis("time per token", min(heights) / 1.6, max(heights) * 1.6, lambda value: si(value, "s", short=True))
        floor = [(x, lowest(x)) for x in steps] if reading or computing else []
        shade_name = f"faster than {'main memory' if beaten else 'this machine'} allows"
        return curves(every, x_axis, y_axis, wide, shade=floor, shade_name=shade_name)

    return Figure("decode", {"beaten": beaten, "few": lines[0].points[0], "many": lines[0].points[-1]}, chart)


def lifetime_cost_figure(rows: Rows, model: Json) -> Figure | None:
    """Draws dollars against served tokens, both logarithmic: training, paid once, and the ways of serving; rings mark where
    they cost the same."""
    trained = first_training_row(rows) or {}
    tokens = TOKENS_PER_PARAMETER * (above_zero(model.get("params")) or 0.0)
    price = above_zero(trained.get("usd_per_million_tokens"))
    served = [row for row in decode_rows(rows) if above_zero(row.get("usd_per_million_tokens"))]
    if not tokens or not price or not served:
        return None
    once = price * tokens / 1e6
    meet = [tokens * price / row["usd_per_million_tokens"] for row in served]
    low, high = 10.0 ** math.floor(math.log10(min(meet) / 20)), 10.0 ** math.ceil(math.log10(max(meet) * 5))
    note = f"{money(once)} for {in_words(tokens)} tokens"
    lines = [Line(((low, once), (high, once)), "paid", f"{trained['name']}, once", note)]
    for rank, (row, crossing) in enumerate(zip(served, meet)):
        cost = row["usd_per_million_tokens"] / 1e6
        points = ((low, cost * low), (high, cost * high))
        lines.append(Line(points, f"way{min(rank, 4)}", row["name"], f"meets it at {in_words(crossing)} tokens"))
    heights = [y for line in lines for _, y in line.points]
    x_axis = Axis("tokens served", low, high, lambda value: in_words(value, short=True))
    y_axis = Axis("cost, dollars", min(heights) / 1.3, max(heights) * 1.3, lambda value: f"${value:,.10g}")
    numbers = {"tokens": tokens, "per_parameter": TOKENS_PER_PARAMETER, "first": served[0]["name"], "meet": meet}
    return Figure("life", numbers, lambda wide: curves(lines, x_axis, y_axis, wide, rings=[(x, once) for x in meet]))


def decode_rows(rows: Rows) -> list[Json]:
    """Returns the rows of the stage `decode`, in the order given."""
    return [row for row in rows if row.get("stage") == "decode"]


def first_training_row(rows: Rows) -> Json | None:
    """Returns the first row that computes gradients of weights."""
    return next((row for row in rows if _flops(row, "dw")), None)


def _flops(row: Json, counter: str) -> float | None:
    return above_zero((row.get("flops_per_token") or {}).get(counter))


def _memory_floor(rows: Rows, ceilings: Json) -> Callable[[float], float] | None:
    """Returns slots -> seconds of reading: bytes a token = shared / slots + own, from the fewest and the most slots."""
    rate = above_zero(ceilings.get("read_gbs"))
    moved = sorted(
        (float(row["slots"]), float(row["bytes_per_token"])) for row in rows if above_zero(row.get("bytes_per_token"))
    )
    if not rate or not moved:
        return None
    (few, most), (many, least) = moved[0], moved[-1]
    shared = max(0.0, (most - least) / (1 / few - 1 / many)) if many > few else most * few
    own = max(0.0, most - shared / few)
    return lambda slots: (shared / slots + own) / (rate * 1e9)


def _compute_floor(rows: Rows, ceilings: Json, model: Json) -> tuple[float, float] | None:
    """Returns the seconds of a token's products at the number type's ceiling, and that ceiling in GFLOP/s."""
    rate = above_zero(ceilings.get(CEILING_OF.get(str(model.get("dtype")), "bf16_gflops")))
    work = [flops for row in rows if (flops := _flops(row, "formula"))]
    return (min(work) / (rate * 1e9), rate) if rate and work else None

"""The four figures of the report: operations by stage, time by batch, memory by stage, and cost over a model's life.

Each is drawn twice, for a page and for a phone, and the style sheet shows the one that fits: text keeps its size. A figure
that the document has no numbers for is None.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.report.charts import Axis, Bar, Line, curves, stacked_bars
from engine.format import in_words, money, positive, si, times

TOKENS_PER_PARAMETER = 20  # of a training that is not stated: compute-optimal, Hoffmann et al. 2022, section 3

_PARTS = (
    ("forward", "forward", "blue"),
    ("dx", "backward, dX", "amber"),
    ("dw", "backward, dW", "rust"),
    ("optimizer", "optimizer", "grey"),
)
_MEMORY = {"params": "blue", "gradients": "rust", "optimizer": "grey", "activations": "amber", "cache": "teal"}
_CEILING_OF = {"float32": "f32_gflops", "int8": "int8_gflops"}  # any other number type meets the bfloat16 one

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing for the page, one for a phone, and the plain text below them."""

    title: str
    wide: str
    narrow: str
    caption: str


def flops_figure(rows: Rows) -> Figure | None:
    """FLOPs per token of each stage in forward passes, stacked forward, dX, dW, optimizer."""
    bars = []
    for row in rows:
        counted = row.get("flops_per_token") or {}
        unit = _forward_pass(row)
        if not unit:
            continue
        parts = tuple((colour, name, (positive(counted.get(key)) or 0.0) / unit) for key, name, colour in _PARTS)
        products = sum(size for _, _, size in parts[:3])
        if products:
            bars.append(Bar(row["name"], row.get("stage") or "", parts, (times(products), si(products * unit, "FLOP"))))
    if not bars:
        return None
    title = "Computation by stage"
    most = max(bars, key=lambda bar: bar.length)
    longest = f"The longest: {most.name}, {most.figures[0]} forward."
    described = (title, f"Stacked bars, one a stage, in forward passes. {longest}")
    key = [(colour, name) for _, name, colour in _PARTS]
    tick = lambda value: f"{value:g}×"
    wide, narrow = (stacked_bars("flops", described, bars, key, tick, wide=wide) for wide in (True, False))
    caption = (
        "Floating-point operations for one token, in units of the forward pass that evaluates it. What a stage adds to its own "
        "forward pass is the gradient with respect to activations (dX) and to weights (dW). The figures beside the bars are "
        "matrix products alone. The optimizer works once a step on each trained weight; over a step's tokens it hardly shows."
    )
    return Figure(title, wide, narrow, caption)


def memory_figure(rows: Rows) -> Figure | None:
    """Bytes by stage, stacked by what they hold, with the peak as a mark."""
    bars, colours = [], dict(_MEMORY)
    for row in rows:
        held = {name: size for name, value in (row.get("memory") or {}).items() if (size := positive(value))}
        if not held:
            continue
        colours |= {name: "violet" for name in held if name not in colours}
        peak = positive(row.get("peak_bytes"))
        parts = tuple((colour, name, held[name]) for name, colour in colours.items() if name in held)
        figures = (si(sum(held.values()), "B"), f"peak {si(peak, 'B')}" if peak else "")
        bars.append(Bar(row["name"], row.get("stage") or "", parts, figures, peak))
    if not bars:
        return None
    title = "Memory by stage"
    seen = {name for bar in bars for _, name, _ in bar.parts}
    key = [(colour, name) for name, colour in colours.items() if name in seen]
    key += [("mark", "peak, as compiled")] if any(bar.mark for bar in bars) else []
    most = max(bars, key=lambda bar: bar.length)
    described = (title, f"Stacked bars, one a stage, in bytes. The largest: {most.name}, {most.figures[0]}.")
    wide, narrow = (
        stacked_bars("memory", described, bars, key, lambda value: si(value, "B", short=True), wide=wide)
        for wide in (True, False)
    )
    caption = (
        "Predicted memory by what it holds; the mark is the peak of the compiled program. Training keeps a gradient and the "
        "optimizer's moments for each trained weight, and activations until the backward pass has used them. Inference keeps "
        "the weights and, when it decodes, a cache for each request."
    )
    return Figure(title, wide, narrow, caption)


def decode_figure(rows: Rows, ceilings: Mapping[str, Any], model: Mapping[str, Any]) -> Figure | None:
    """Time per token against slots, both logarithmic, above the two times that this machine cannot beat."""
    served = [row for row in decoding(rows) if positive(row.get("slots")) and positive(row.get("seconds_per_token"))]
    if not served:
        return None
    slots = sorted({float(row["slots"]) for row in served})
    lines = []
    ways = list(dict.fromkeys(row.get("series") or "decode" for row in served))
    for rank, way in enumerate(ways):
        mine = sorted((row for row in served if (row.get("series") or "decode") == way), key=lambda row: row["slots"])
        points = tuple((float(row["slots"]), float(row["seconds_per_token"])) for row in mine)
        spreads = tuple(positive(row.get("spread")) or 0.0 for row in mine)
        lines.append(Line(points, f"way{min(rank, 4)}", f"{way}, measured", dots=True, spreads=spreads, below=rank > 0))
    first, last = lines[0].points[0], lines[0].points[-1]
    plain = [row for row in served if (row.get("series") or "decode") == ways[0]]
    memory, compute = _memory_floor(plain, ceilings), _compute_floor(plain, ceilings, model)
    trained = training(rows)
    took = positive(trained.get("seconds_per_token")) if trained else None
    lowest = lambda slots: max(memory(slots) if memory else 0.0, compute[0] if compute else 0.0)
    beaten = ""
    if any(seconds < lowest(at) for each in lines for at, seconds in each.points):
        beaten = "A dot below them moves fewer bytes than the first way, or finds its weights in the processor's cache."

    def draw(wide: bool) -> str:
        low, high = slots[0] / 1.15, slots[-1] * (1.2 if wide else 1.9)  # a phone has no margin for the last dot's figure
        steps = [low * (high / low) ** (index / 32) for index in range(33)]
        level = lambda seconds: ((low, seconds), (high, seconds))
        every = list(lines)
        if trained and took:
            every.append(Line(level(took), "reference", trained["name"], f"{si(took, 's')} a token"))
        if memory:
            note = f"its bytes at {ceilings['read_gbs']:.3g} GB/s"
            every.append(Line(tuple((x, memory(x)) for x in steps), "memory", "memory ceiling", note))
        if compute:
            every.append(Line(level(compute[0]), "compute", "compute ceiling", f"its FLOPs at {compute[1]:.3g} GFLOP/s"))
        floor = [(x, lowest(x)) for x in steps] if memory or compute else []
        heights = [y for each in every for _, y in each.points]
        doublings = tuple(sorted({2.0**power for power in range(12) if slots[0] <= 2.0**power <= slots[-1]} | set(slots)))
        across = Axis("slots (requests decoded together)", low, high, lambda value: f"{value:g}", doublings)
        up = Axis("time per token", min(heights) / 1.6, max(heights) * 1.6, lambda value: si(value, "s", short=True))
        shaded = f"faster than {'main memory' if beaten else 'this machine'} allows" if floor else ""
        return curves("decode", (title, described), every, across, up, wide=wide, shade=floor, shade_says=shaded)

    title = "Decoding against batch"
    ends = f"{si(first[1], 's')} with {first[0]:g} slots and {si(last[1], 's')} with {last[0]:g}"
    described = f"Both axes logarithmic. A token takes {ends}."
    caption = (
        "A lone request pays for reading every weight to make one token. Requests decoded together share that read, until the "
        "products themselves take the time. Both ceilings were measured in the same run; what lies between them and a dot "
        f"above them is overhead.{' ' + beaten if beaten else ''}"
    )
    return Figure(title, draw(True), draw(False), caption)


def life_figure(rows: Rows, model: Mapping[str, Any], life: Mapping[str, Any]) -> Figure | None:
    """Dollars against tokens served, both logarithmic: training paid once, and each way of serving; rings where they cross."""
    trained = training(rows)
    stated = positive(life.get("training_tokens"))
    tokens = stated or TOKENS_PER_PARAMETER * (positive(model.get("params")) or 0.0)
    price = positive(trained.get("usd_per_million_tokens")) if trained else None
    ways = [row for row in decoding(rows) if positive(row.get("usd_per_million_tokens"))]
    if not trained or not tokens or not price or not ways:
        return None
    once = price * tokens / 1e6
    meet = [tokens * price / row["usd_per_million_tokens"] for row in ways]
    low, high = 10.0 ** math.floor(math.log10(min(meet) / 20)), 10.0 ** math.ceil(math.log10(max(meet) * 5))
    lines = [
        Line(((low, once), (high, once)), "paid", f"{trained['name']}, once", f"{money(once)} for {in_words(tokens)} tokens")
    ]
    for rank, (row, crossing) in enumerate(zip(ways, meet)):
        cost = row["usd_per_million_tokens"] / 1e6
        points = ((low, cost * low), (high, cost * high))
        lines.append(Line(points, f"way{min(rank, 4)}", row["name"], f"meets it at {in_words(crossing)} tokens"))
    heights = [y for each in lines for _, y in each.points]
    title = "Cost over a model's life"
    described = (
        title,
        "Both axes logarithmic. "
        f"Serving has cost as much as training after {in_words(min(meet))} to {in_words(max(meet))} tokens.",
    )
    across = Axis("tokens served", low, high, lambda value: in_words(value, short=True))
    up = Axis("cost, dollars", min(heights) / 1.3, max(heights) * 1.3, lambda value: f"${value:,.10g}")
    wide, narrow = (
        curves("life", described, lines, across, up, wide=wide, rings=[(x, once) for x in meet]) for wide in (True, False)
    )
    share = times(meet[0] / tokens).rstrip("×")
    basis = "as stated" if stated else f"{TOKENS_PER_PARAMETER} for each parameter, the compute-optimal amount"
    caption = (
        f"Training is paid once, here for {in_words(tokens)} tokens ({basis}); serving is paid for every token. At a ring both "
        f"have cost the same: for “{ways[0]['name']}” after {share} times as many tokens served as trained on, however many "
        "those are and whatever an hour costs. Right of the rings, what a model costs is what serving it costs."
    )
    return Figure(title, wide, narrow, caption)


def decoding(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows that decode: those of that stage or, when none is named so, those with slots."""
    return [row for row in rows if row.get("stage") == "decode"] or [row for row in rows if positive(row.get("slots"))]


def training(rows: Rows) -> Mapping[str, Any] | None:
    """The first row that computes gradients of weights."""
    return next((row for row in rows if positive((row.get("flops_per_token") or {}).get("dw"))), None)


def _forward_pass(row: Mapping[str, Any]) -> float | None:
    """FLOPs a token of the forward pass that the row's ratio is to; without a ratio, of the row's own."""
    counted = row.get("flops_per_token") or {}
    whole, ratio = positive(counted.get("formula")), positive(row.get("flop_ratio_to_forward"))
    return whole / ratio if whole and ratio else positive(counted.get("forward"))


def _memory_floor(rows: Rows, ceilings: Mapping[str, Any]) -> Callable[[float], float] | None:
    """slots -> seconds that reading takes: bytes a token = shared / slots + own, from the fewest and the most slots."""
    read = positive(ceilings.get("read_gbs"))
    moved = sorted((float(row["slots"]), float(row["bytes_per_token"])) for row in rows if positive(row.get("bytes_per_token")))
    if not read or not moved:
        return None
    (few, most), (many, least) = moved[0], moved[-1]
    shared = max(0.0, (most - least) / (1 / few - 1 / many)) if many > few else most * few
    own = max(0.0, most - shared / few)
    return lambda slots: (shared / slots + own) / (read * 1e9)


def _compute_floor(rows: Rows, ceilings: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[float, float] | None:
    """Seconds that a token's products take at the ceiling of the model's number type, and that ceiling in GFLOP/s."""
    rate = positive(ceilings.get(_CEILING_OF.get(str(model.get("dtype")), "bf16_gflops")))
    work = [found for row in rows if (found := positive((row.get("flops_per_token") or {}).get("formula")))]
    return (min(work) / (rate * 1e9), rate) if rate and work else None

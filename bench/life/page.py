"""Writes the life of a model as one self-contained page: four columns, and when inference has cost as much as training."""

import math
from pathlib import Path
from typing import Any

from bench.cli import Json
from bench.report.charts import Axis, Line, curves
from bench.report.templates import environment
from engine.files import atomic_file
from engine.format import in_words, money, si

HERE = Path(__file__).parent


def write_page(folder: Path, document: Json) -> Path:
    """Writes `folder`/life.html and returns its path."""
    training, tuning, serving = document["rows"]
    here = [training["usd"], tuning["usd"], serving["usd"] / serving["tokens"]]
    large = [row["dollars"][1] for row in document["large"]["rows"]]
    charts = [
        [_chart(once, each_time, of_token, even, wide) for wide in (True, False)]
        for (once, each_time, of_token), even in (
            (here, document["even"]),
            ((large[0], large[1], large[2] / 1e6), document["even_large"]),
        )
    ]
    text = environment(HERE).get_template("life.html.j2").render(document, charts=charts)
    with atomic_file(folder / "life.html") as file:
        file.write(text.encode())
    return folder / "life.html"


def _chart(training: float, tuning: float, each: float, even: float, wide: bool) -> dict[str, Any]:
    """Lays out dollars against tokens of answers, both logarithmic: paid once, paid once, and paid for `each` token."""
    low, high = 10.0 ** math.floor(math.log10(even / 300)), 10.0 ** math.ceil(math.log10(even * 20))
    lines = [
        Line(((low, training), (high, training)), "training", "training", f"once: {money(training)}"),
        Line(((low, tuning), (high, tuning)), "tuning", "fine-tuning", f"each time: {money(tuning)}"),
        Line(((low, each * low), (high, each * high)), "way0", "answers", f"{money(each * 1e6)} a million tokens"),
    ]
    heights = [y for line in lines for _, y in line.points]
    x_axis = Axis("tokens of answers", low, high, lambda value: in_words(value, short=True))
    dollars = lambda value: f"${si(value, '', short=True) if value >= 1000 else f'{value:.9f}'.rstrip('0').rstrip('.')}"
    y_axis = Axis("cost, dollars", 10.0 ** math.floor(math.log10(min(heights))), max(heights) * 1.5, dollars)
    return curves(lines, x_axis, y_axis, wide, rings=[(even, training)])

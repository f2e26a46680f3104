"""Prompting, fine-tuning or training: the requests after which a longer prompt has cost as much as having it in the weights."""

import math
from collections.abc import Sequence
from typing import Any

from bench.plan.answer import Answer, Interval, around, interval
from bench.plan.formulas import longer_prompt
from bench.plan.serving import PRECISIONS, fit_serving
from engine.format import in_words


def plan_break_even(
    name: str,
    m: Any,
    d: Any,
    extra: float,
    lengths: Sequence[float],
    precision: str,
    tuning: float,
    investments: dict[str, Interval],
) -> Answer:
    """Returns the requests after which `extra` tokens before each prompt cost as much as each investment, in device-hours.

    The low bound is a cheap investment against a dear prompt, the high bound the other way round. Costs are in device-hours
    where the device has no price. `tuning`: tokens that are tuned on.
    """
    prompt, answer, _ = lengths
    price, unit = (math.sqrt(d.low * d.high), "dollars") if d.low else (1.0, "hours")
    each, fit = longer_prompt(m, d, *PRECISIONS[precision], extra, prompt, answer), fit_serving()
    lines = {
        method: interval((bound * price for bound in hours[:3]), unit, hours.origin) for method, hours in investments.items()
    }
    for kind, words in (("computed", "without a prefix cache"), ("cached", "with a prefix cache")):
        cost = around(each[kind] / 3600 * price, fit.spread, unit, fit.origin)
        lines[f"the longer prompt of a request, {words}"] = cost
        for method in investments:
            bounds = (lines[method].low / cost.high, lines[method].middle / cost.middle, lines[method].high / cost.low)
            lines[f"{method} pays after, {words}"] = interval(bounds, "requests", "what it costs over that of a request")
    method = next(iter(investments))
    computed, cached = (lines[f"{method} pays after, {words} a prefix cache"] for words in ("without", "with"))
    note = (
        f"Both cost the same at {in_words(computed.middle)} requests ({in_words(cached.middle)} cached). By the bounds: "
        f"put the {extra:,.0f} tokens into the prompt while fewer than {in_words(computed.low)} requests are to come, and into "
        f"the weights by {method} beyond {in_words(computed.high)}; with a prefix cache, {in_words(cached.low)} and "
        f"{in_words(cached.high)}. That is computing alone: examples cost too, and how good answers are must be measured."
    )
    rent = f" at ${price:.3g} an hour" if d.low else ""
    question = f"{extra:,.0f} tokens more in each prompt of {name}, or in its weights"
    return Answer(f"{question} by tuning on {in_words(tuning)} tokens, on {d.name}{rent}", lines, "", (note,))

"""Backward: the model and tokens that a budget buys, compute-optimal, and smaller where much is served.

Compute-optimal by the law of loss of Hoffmann et al. 2022 (2203.15556) as fitted anew by Besiroglu et al. 2024 (2404.10102),
and by the rule of 20 tokens a parameter, on which the first paper's other methods agree. The over-trained model has the least
loss where one budget pays for training and serving, 6 N D + 2 N S (Sardana et al. 2024, 2401.00448).
"""

import math
from types import SimpleNamespace
from typing import Any

from bench.plan.answer import Answer, Interval, around, interval
from bench.plan.formulas import SHARE, efficiency, optimal, training_memory
from bench.plan.model import config_of_size, job
from bench.plan.training import holders
from engine.errors import UserError
from engine.format import in_words, money, percent

RULE = 20  # tokens a parameter (2203.15556, table 3)
E, LAW = 1.8172, SimpleNamespace(a=482.01, b=2085.43, alpha=0.3478, beta=0.3658)  # 2404.10102, table 1


def plan_budget(d: Any, devices: int, dollars: float | None, days: float, served: float | None) -> Answer:
    """Returns what dollars, or days, buy. Raises UserError without a price, or when serving alone would use it up."""
    hours, spread, origin, budget = 24 * days * devices, d.spread, d.origin, f"{days:g} days"
    if dollars is not None:
        if not d.low:
            raise UserError(f"No price of {d.name} was found in a source: give --price DOLLARS an hour, or --days.")
        hours, spread = dollars / math.sqrt(d.low * d.high), spread + math.log(d.high / d.low) / 2
        origin, budget = f"{origin}; ${d.low:g} to ${d.high:g} an hour", money(dollars)
    (low, least), (flops, params), (high, most) = (_best(hours * math.exp(sign * spread), d, devices) for sign in (-1, 0, 1))
    rule = [math.sqrt(each / 6 / RULE) for each in (low, flops, high)]
    laws = "Besiroglu 2024 to Hoffmann 2022"
    lines = {
        "device-hours": around(hours, 0, "hours", "the budget, at the middle of the price" if dollars else "the days"),
        "wall time": around(3600 * hours / devices, 0, "seconds", "device-hours over the devices"),
        "FLOPs": Interval(low, flops, high, "FLOP", origin),
        "compute-optimal parameters": Interval(min(least, rule[0]), params, max(most, rule[2]), "parameters", laws),
        "compute-optimal tokens": Interval(low / 6 / least, flops / 6 / params, high / 6 / most, "tokens", "FLOPs / 6 N"),
        "at 20 tokens a parameter": interval(rule, "parameters", "Hoffmann 2022, methods 1 and 2"),
    }
    notes = []
    m = job(config_of_size(min(max(params, 1e7), 1e14)), "pretrain", 4096)
    if training_memory(m, devices, 1) > SHARE * d.memory:
        notes.append(f"The compute-optimal model does not fit on {devices} x {d.name}; {holders(m, d)}.")
    if served:
        small, tokens, loss = over_trained(flops, served)
        lines["over-trained parameters"] = around(small, 0, "parameters", "least loss for 6 N D + 2 N S (Sardana 2024)")
        lines["over-trained tokens"] = around(tokens, 0, "tokens", f"{tokens / small:,.0f} a parameter")
        large, _, best = over_trained(flops, 0)
        notes.append(
            f"With {in_words(served)} tokens served out of the same budget, {in_words(small)} parameters reach a loss of "
            f"{loss:.3f}. Spent on training alone, it would give {in_words(large)} parameters and {best:.3f}, and serving them "
            f"would cost {percent(2 * large * served / flops)} on top."
        )
    return Answer(f"{budget} on {devices} x {d.name}", lines, "", tuple(notes))


def _best(hours: float, d: Any, devices: int) -> tuple[float, float]:
    """Returns the FLOPs of device-hours and the compute-optimal parameters; efficiency depends on those, so by iteration."""
    params = 1e9
    for _ in range(30):
        flops = hours * 3600 * d.peak * efficiency(d, params, devices, 0)
        params = optimal(flops, **vars(LAW))
    return flops, params


def over_trained(flops: float, served: float) -> tuple[float, float, float]:
    """Returns parameters, tokens and loss of least loss for 6 N D + 2 N `served` = `flops`, from a million parameters up.

    Raises UserError when serving the smallest would take all of it.
    """
    sizes = (1e6 * 10 ** (step / 250) for step in range(2000))
    pairs = [(size, tokens) for size in sizes if (tokens := flops / (6 * size) - served / 3) > 0]
    if not pairs:
        raise UserError(f"Serving {in_words(served)} tokens takes the whole budget; give a larger one, or fewer --served.")
    losses = [(E + LAW.a / size**LAW.alpha + LAW.b / tokens**LAW.beta, size, tokens) for size, tokens in pairs]
    loss, params, tokens = min(losses)
    return params, tokens, loss

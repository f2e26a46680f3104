"""Serving by a roofline with three numbers fitted to published rates: what compute and bandwidth yield, and a layer's start."""

import functools
import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from bench.plan.answer import Answer, around, costs, interval
from bench.plan.efficiency import spread_of
from bench.plan.formulas import SHARE, Numbers, serving
from bench.plan.hardware import numbers
from bench.plan.published import accelerators, rows
from bench.plan.training import SLOTS
from engine.errors import UserError
from engine.format import format_bytes

PRECISIONS = {"bfloat16": (16, 16), "int8": (8, 8), "int4": (4.5, 16)}  # bits of a weight, and of the KV cache
# What is tried: shares of the peak and of the bandwidth, and seconds to start a layer's kernels.
_TRIED = list(itertools.product(np.arange(0.40, 0.86, 0.05), np.arange(0.6, 0.96, 0.05), np.arange(0, 1.3e-4, 1e-5)))
USES = ("compute_use", "bandwidth_use", "layer_seconds")


class Fit(NamedTuple):
    """The three numbers, and the spread of a rate's logarithm each way."""

    uses: Numbers
    spread: float
    origin: str


@functools.cache
def _errors() -> Any:
    """(settings that are tried, published rates): logarithms of predicted over measured."""
    uses = dict(zip(USES, np.array(_TRIED).T))
    return np.array([np.log(predicted_rate(row, uses) / row.tokens_per_second) for row in rows("serving_runs")]).T


def predicted_rate(row: Any, uses: dict[str, Any]) -> Any:
    """Returns the tokens a second that the formula gives for a published rate's setting; an array where `uses` are arrays."""
    d = numbers(accelerators()[row.hardware], **uses)
    m = SimpleNamespace(**vars(row), query_width=row.width)
    slots, cached = row.batch or SLOTS, row.batch == 1  # a lone stream was timed without its prompt
    return serving(m, d, row.weight_bits, row.kv_bits, row.devices, slots, row.prompt, row.answer, cached)["tokens"]


def fit_serving(without: int | None = None) -> Fit:
    """Fits to the published rates but one: the setting of least mean error."""
    errors = _errors() if without is None else np.delete(_errors(), without, axis=1)
    best = int(np.abs(errors).mean(axis=1).argmin())
    origin = f"{errors.shape[1]} published rates of TensorRT-LLM and gpt-fast on A100, H100 and H200"
    return Fit(dict(zip(USES, map(float, _TRIED[best]))), spread_of(errors[best]), origin)


def plan_serving(
    name: str,
    m: Any,
    d: Any,
    devices: int,
    *,
    requests: float,
    lengths: Sequence[float],
    slots: int,
    precision: str,
) -> Answer:
    """Returns the answer for so many requests a second, from replicas of `devices`. `lengths`: of prompt and answer, and the
    cached share of prompts. Raises UserError when one request does not fit."""
    prompt, answer, cached = lengths
    load = lambda slots: serving(m, d, *PRECISIONS[precision], devices, slots, prompt, answer, cached)
    most, fit = load(slots), fit_serving()
    if not most["fits"]:
        bits, kv_bits = PRECISIONS[precision]
        weights, cache = m.params * bits / 8, (prompt + answer) * m.layers * m.kv_width * kv_bits / 4
        enough = math.ceil((weights + cache) / SHARE / d.memory)
        raise UserError(
            f"A request of {prompt:g} + {answer:g} tokens does not fit: the weights take {format_bytes(weights)}, its cache "
            f"{format_bytes(cache)}, and {devices} x {d.name} have {format_bytes(SHARE * devices * d.memory)} free. "
            f"Give --devices {enough}{', or --precision int8' if bits == 16 else ''}."
        )
    rate = around(most["requests"], fit.spread, "requests a second", f"of a replica; {fit.origin}")
    replicas = [math.ceil(requests / each) for each in (rate.high, rate.middle, rate.low)]
    # At this load no more requests are under way than keep up with it.
    loads = (load(2**power) for power in range(int(most["batch"]).bit_length()))
    loaded = next((each for each in loads if each["requests"] >= requests / replicas[1]), most)
    at_once = f"at this load: {loaded['batch']:g} at once"
    lines = {
        "can serve at most": rate,
        "answer tokens at most": around(most["tokens"], fit.spread, "a second", f"of a replica at its most; {fit.origin}"),
        "replicas": interval(replicas, "replicas", "for the requests asked for"),
        "first token": around(loaded["first_token"], fit.spread, "seconds", "without waiting in a queue"),
        "between tokens": around(loaded["token_seconds"], fit.spread, "seconds", at_once),
        "memory a device": around(loaded["needed"], 0, "bytes", "weights and KV cache, by formula"),
    }
    for label, line in costs(interval((count * devices for count in replicas), "hours", ""), d).items():
        lines[f"{label} a day"] = interval((24 * bound for bound in line[:3]), line.unit, line.origin)
        per_million = (bound / (3600 * requests * answer) * 1e6 for bound in line[:3])
        lines[f"{label} a million answer tokens"] = interval(per_million, line.unit, "all replicas, over the tokens asked for")
    parts = {
        "prefilling": "prefill, by compute", "reading": "reading the weights, by memory bandwidth",
        "attending": "reading the KV cache, by memory bandwidth", "multiplying": "products of decoding, by compute",
        "launching": f"launching kernels, because only {loaded['batch']:g} requests run at once",
    }  # fmt: skip
    slowest = max(parts, key=lambda part: loaded[part])
    question = f"{name} in {precision}: {requests:g} requests a second of {prompt:g} + {answer:g} tokens, {devices} x {d.name}"
    share = loaded[slowest] / loaded["token_seconds"]
    return Answer(question, lines, f"{share:.0%} of the time goes into {parts[slowest]}")

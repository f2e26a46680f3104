"""The planner's questions: a training run, a served model, what a budget buys, and a longer prompt or tuning.

Compute-optimal is by the law of loss of Hoffmann et al. 2022 (2203.15556) as fitted anew by
Besiroglu et al. 2024 (2404.10102), and by the rule of 20 tokens a parameter, on which the first
paper's other methods agree.
"""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from bench.plan.fits import SLOTS, PlannedDevice, fit_serving
from bench.plan.hardware import HERE
from bench.plan.model import config_of_size, job
from bench.plan.published_rows import clean_runs
from bench.terminal import print_table
from engine.errors import UserError
from engine.format import duration, format_bytes, in_words, money, si, significant
from engine.planning.formulas import (
    SHARE,
    Numbers,
    bytes_a_device,
    efficiency,
    longer_prompt,
    optimal,
    serving,
    training,
)

# Of the watts in the table, what runs drew: OLMo-3 on H100, 624 and 649 of 700 (muxup.com/2025q4);
# LLaMA on A100, 400 and a tenth for the building (2302.13971, table 15).
POWER = (0.89, 1.10)
_SCALES = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
# Shares of the formula, with and without recomputation, between which published peaks lie.
MEMORY = (0.9, 1.1)
ADAPTER_BOUND = 0.3  # within which published times of LoRA over those of full fine-tuning lie
# bits of a weight, and of the KV cache
PRECISIONS = {"bfloat16": (16, 16), "int8": (8, 8), "int4": (4.5, 16)}
RULE = 20  # tokens a parameter (2203.15556, table 3)
LAW = SimpleNamespace(a=482.01, b=2085.43, alpha=0.3478, beta=0.3658)  # 2404.10102, table 1


class Interval(NamedTuple):
    """A quantity between two bounds, which are equal where it is exact; `origin`: where it comes
    from.
    """

    low: float
    middle: float
    high: float
    unit: str
    origin: str

    def scaled(self, factor: float, unit: str, origin: str) -> "Interval":
        return interval((bound * factor for bound in self[:3]), unit, origin)


class PlannedAnswer(NamedTuple):
    """What was asked, the quantities by name, what binds, and notes."""

    question: str
    lines: dict[str, Interval]
    binding: str = ""
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        lines = {name: line._asdict() for name, line in self.lines.items()}
        return {"question": self.question, "answer": lines, "binding": self.binding, "notes": self.notes}

    def print(self) -> None:
        """Prints the quantities as a table, then what binds, and the notes."""
        print_table(self.question, ("", "", "", ""), cells(self.document()), left=4)
        if self.binding:
            print(f"what binds: {self.binding}")
        for note in self.notes:
            print(note)


def cells(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields each quantity of an answer: its name, the middle, the bounds unless it is exact, and
    its origin.
    """
    for name, line in document["answer"].items():
        unit = line["unit"]
        middle = write(line["middle"], unit)
        low = write(line["low"], unit)
        high = write(line["high"], unit)
        bounds = "" if low == high else f"{low} to {high}"
        yield name, middle, bounds, line["origin"]


def interval(bounds: Iterable[float], unit: str, origin: str) -> Interval:
    low, middle, high = bounds
    return Interval(low, middle, high, unit, origin)


def around(middle: float, spread: float, unit: str, origin: str) -> Interval:
    """Returns the interval of a logarithm's spread each way; 0 for what is exact."""
    return Interval(middle * math.exp(-spread), middle, middle * math.exp(spread), unit, origin)


def costs(hours: Interval, d: PlannedDevice) -> dict[str, Interval]:
    """Returns dollars and energy of device-hours, where the device has a price and watts."""
    lines = {}
    if d.high:
        prices = (d.low, math.sqrt(d.low * d.high), d.high)
        dollars = map(operator.mul, hours[:3], prices)
        origin = f"${d.low:g} to ${d.high:g} a device-hour: {d.price}"
        lines["dollars"] = interval(dollars, unit="dollars", origin=origin)
    if d.watts:
        low, high = (share * d.watts / 1000 for share in POWER)
        kilowatts = (low, math.sqrt(low * high), high)
        energy = map(operator.mul, hours[:3], kilowatts)
        origin = f"{d.watts:g} W, of which runs draw 89% to 110%"
        lines["energy"] = interval(energy, unit="kWh", origin=origin)
    return lines


def write(value: float, unit: str) -> str:
    """Writes a quantity as a person reads it: `8.21 days`, `$240`, `12.4 GB`, `37%`, `26.9 k
    tokens`.
    """
    match unit:
        case "seconds" if value < 3600:
            if value < 60:
                return si(value, "s")
            return duration(value)
        case "seconds":
            if value < 172800:
                return f"{significant(value / 3600)} h"
            return f"{significant(value / 86400)} days"
        case "dollars":
            return money(value)
        case "bytes":
            return format_bytes(value)
        case "share":
            return f"{100 * value:.0f}%"
        case "FLOP":
            return f"{value:.3g} FLOP"
        case "hours" | "kWh":
            return f"{significant(value)} {unit}"
        case _:
            number = in_words(value) if value >= 1000 else f"{value:.3g}"
            return f"{number} {unit}"


def amount(flag: str, text: str | None) -> float:
    """Reads `100B`, `9T`, `5e9` or `1,000`. Raises UserError, naming the flag, for anything else or
    nothing above 0.
    """
    digits = (text or "").strip().replace(",", "")
    scale = _SCALES.get(digits[-1:], 1.0)
    try:
        value = float(digits.rstrip("".join(_SCALES)) if scale > 1 else digits) * scale
    except ValueError:
        value = math.nan
    if not 0 < value < 1e18:
        if text is None:
            wrong = "is missing: give a number"
        else:
            wrong = f"must be a number above 0 and below 1e18, not {text!r}"
        raise UserError(f"{flag} {wrong}, such as 100B, 5e9 or 1,000.")
    return value


def plan_training(
    name: str, method: str, m: Any, d: PlannedDevice, tokens: float, devices: int
) -> PlannedAnswer:
    """Returns the answer for a model and method m on so many devices d."""
    sampling = 0.0
    if method == "rl":
        prompt = m.context / 4
        completion = 3 * prompt  # answers are three quarters of a text
        estimates = serving(
            m,
            d,
            bits=16,
            kv_bits=16,
            devices=devices,
            slots=SLOTS,
            prompt=prompt,
            answer=completion,
            cached=0,
        )
        sampling = devices / estimates["tokens"]
    result = training(m, d, tokens, devices, sampling)
    spread = d.spread
    origin = d.origin
    if method.startswith(("lora", "qlora", "freeze")):
        spread = math.hypot(spread, math.log(1 + ADAPTER_BOUND))
        origin = f"{origin}; LoRA's over full tuning's, within 30%"
    middle = result["device_hours"]
    share = result["efficiency"]
    # No run is faster than the peak.
    hours = Interval(
        middle * max(share, math.exp(-spread)), middle, middle * math.exp(spread), "hours", origin
    )
    shares = (share * math.exp(-d.spread), share, min(1, share * math.exp(d.spread)))
    lines = {
        "FLOPs": around(result["flops"], 0, "FLOP", "counted: every product, and causal attention"),
        "share of peak": interval(shares, "share", d.origin),
        "device-hours": hours,
        "wall time": hours.scaled(3600 / devices, "seconds", "device-hours over the devices"),
        "memory a device": Interval(
            MEMORY[0] * result["least"],
            result["needed"],
            MEMORY[1] * result["needed"],
            "bytes",
            f"of {format_bytes(d.memory)}: by formula, "
            "from recomputing all activations to as few as fit, and 10%",
        ),
        **costs(hours, d),
    }
    notes = []
    if result["recompute"]:
        notes.append("activations are computed a second time, for they would not fit")
    sizes = [run.params for run in clean_runs()]
    if d.name != HERE and not min(sizes) <= m.params <= max(sizes):
        notes.append(
            "no run of a model of this size was published: "
            "its share of the peak is extrapolated, and may be far off"
        )
    question = f"{method} of {name} on {in_words(tokens)} tokens, {devices} x {d.name}"
    return PlannedAnswer(question, lines, _binding(result, m, d, devices), tuple(notes))


def holders(m: Any, d: PlannedDevice) -> str:
    """Returns in words how many devices hold the model's training, as a power of two."""
    for power in range(20):
        count = 2**power
        if bytes_a_device(m, count, recompute=1) <= SHARE * d.memory:
            return f"about {count} would hold it"
    return f"no number of them holds a text of {m.context:,} tokens"


def _binding(result: Numbers, m: Any, d: PlannedDevice, devices: int) -> str:
    """Returns in words what limits the run: memory that is not there, or the slowest of what it
    does.
    """
    if result["needed"] > SHARE * d.memory:
        needed = (
            f"{format_bytes(result['needed'])} on each of {devices}, {format_bytes(SHARE * d.memory)} free"
        )
        return f"memory, for it does not fit: {needed}; {holders(m, d)}"
    words = {
        "products": "matrix products: compute",
        "updates": "the optimizer's update: memory bandwidth",
        "generated": "generating the answers: memory bandwidth",
        "exchanges": "the network, to send weights and gradients with one text a device at a time",
    }
    return words[max(words, key=result.__getitem__)]


def plan_serving(
    name: str,
    m: Any,
    d: PlannedDevice,
    devices: int,
    *,
    requests: float,
    lengths: Sequence[float],
    precision: str,
) -> PlannedAnswer:
    """Returns the answer for so many requests a second, from replicas of `devices`. `lengths`: of
    prompt and answer, and the cached share of prompts. Raises UserError when one request does not
    fit.
    """
    prompt, answer, cached = lengths

    def load(slots: int) -> Numbers:
        return serving(m, d, *PRECISIONS[precision], devices, slots, prompt, answer, cached)

    most = load(SLOTS)
    fit = fit_serving()
    if not most["fits"]:
        raise _does_not_fit(m, d, devices, prompt=prompt, answer=answer, precision=precision)
    rate = around(most["requests"], fit.spread, "requests a second", f"of a replica; {fit.origin}")
    replicas = [math.ceil(requests / each) for each in (rate.high, rate.middle, rate.low)]
    # At this load no more requests are under way than keep up with it.
    requests_a_replica = requests / replicas[1]
    loaded = most
    for power in range(int(most["batch"]).bit_length()):
        fewer = load(2**power)
        if fewer["requests"] >= requests_a_replica:
            loaded = fewer
            break
    at_once = f"at this load: {loaded['batch']:g} at once"
    lines = {
        "can serve at most": rate,
        "answer tokens at most": around(
            most["tokens"], fit.spread, "a second", f"of a replica at its most; {fit.origin}"
        ),
        "replicas": interval(replicas, "replicas", "for the requests asked for"),
        "first token": around(loaded["first_token"], fit.spread, "seconds", "without waiting in a queue"),
        "between tokens": around(loaded["token_seconds"], fit.spread, "seconds", at_once),
        "memory a device": around(loaded["needed"], 0, "bytes", "weights and KV cache, by formula"),
    }
    for label, line in costs(lines["replicas"].scaled(devices, "hours", ""), d).items():
        lines[f"{label} a day"] = line.scaled(24, line.unit, line.origin)
        million_tokens = 1e6 / (3600 * requests * answer)
        lines[f"{label} a million answer tokens"] = line.scaled(
            million_tokens, line.unit, "all replicas, over the tokens asked for"
        )
    parts = {
        "prefilling": "prefill, by compute",
        "reading": "reading the weights, by memory bandwidth",
        "attending": "reading the KV cache, by memory bandwidth",
        "multiplying": "products of decoding, by compute",
        "launching": f"launching kernels, because only {loaded['batch']:g} requests run at once",
    }
    slowest = max(parts, key=loaded.__getitem__)
    question = (
        f"{name} in {precision}: {requests:g} requests a second "
        f"of {prompt:g} + {answer:g} tokens, {devices} x {d.name}"
    )
    share = loaded[slowest] / loaded["token_seconds"]
    return PlannedAnswer(question, lines, f"{share:.0%} of the time goes into {parts[slowest]}")


def _does_not_fit(
    m: Any, d: PlannedDevice, devices: int, *, prompt: float, answer: float, precision: str
) -> UserError:
    """Returns the error for a request that the devices cannot hold, with how many of them can."""
    bits, kv_bits = PRECISIONS[precision]
    weights = m.params * bits / 8
    cache = (prompt + answer) * m.layers * m.kv_width * kv_bits / 4
    remedy = f"--devices {math.ceil((weights + cache) / SHARE / d.memory)}"
    if bits == 16:
        remedy += ", or --precision int8"
    return UserError(
        f"A request of {prompt:g} + {answer:g} tokens does not fit: "
        f"the weights take {format_bytes(weights)}, its cache {format_bytes(cache)}, "
        f"and {devices} x {d.name} have {format_bytes(SHARE * devices * d.memory)} free. "
        f"Give {remedy}."
    )


def plan_budget(d: PlannedDevice, devices: int, dollars: float | None, days: float) -> PlannedAnswer:
    """Returns what dollars, or days, buy. Raises UserError without a price."""
    hours = 24 * days * devices
    spread = d.spread
    origin = d.origin
    budget = f"{days:g} days"
    if dollars is not None:
        if not d.low:
            raise UserError(
                f"No price of {d.name} was found in a source: give --price DOLLARS an hour, or --days."
            )
        hours = dollars / math.sqrt(d.low * d.high)
        spread = spread + math.log(d.high / d.low) / 2
        origin = f"{origin}; ${d.low:g} to ${d.high:g} an hour"
        budget = money(dollars)
    low, low_params = _best(hours * math.exp(-spread), d, devices)
    flops, params = _best(hours, d, devices)
    high, high_params = _best(hours * math.exp(spread), d, devices)
    rule = [math.sqrt(each / 6 / RULE) for each in (low, flops, high)]
    laws = "Besiroglu 2024 to Hoffmann 2022"
    lines = {
        "device-hours": around(
            hours, 0, "hours", "the budget, at the middle of the price" if dollars else "the days"
        ),
        "wall time": around(3600 * hours / devices, 0, "seconds", "device-hours over the devices"),
        "FLOPs": Interval(low, flops, high, "FLOP", origin),
        "compute-optimal parameters": Interval(
            min(low_params, rule[0]), params, max(high_params, rule[2]), "parameters", laws
        ),
        "compute-optimal tokens": Interval(
            low / 6 / low_params, flops / 6 / params, high / 6 / high_params, "tokens", "FLOPs / 6 N"
        ),
        "at 20 tokens a parameter": interval(rule, "parameters", "Hoffmann 2022, methods 1 and 2"),
    }
    notes: tuple[str, ...] = ()
    m = job(config_of_size(min(max(params, 1e7), 1e14)), "pretrain", 4096)
    if bytes_a_device(m, devices, 1) > SHARE * d.memory:
        notes = (f"The compute-optimal model does not fit on {devices} x {d.name}; {holders(m, d)}.",)
    return PlannedAnswer(f"{budget} on {devices} x {d.name}", lines, "", notes)


def _best(hours: float, d: PlannedDevice, devices: int) -> tuple[float, float]:
    """Returns the FLOPs of device-hours and the compute-optimal parameters; efficiency depends on
    those, so by iteration.
    """
    params = 1e9
    for _ in range(30):
        flops = hours * 3600 * d.peak * efficiency(d, params, devices, 0)
        params = optimal(flops, **vars(LAW))
    return flops, params


def plan_break_even(
    name: str,
    m: Any,
    d: PlannedDevice,
    extra: float,
    lengths: Sequence[float],
    precision: str,
    tuning: float,
    investments: dict[str, Interval],
) -> PlannedAnswer:
    """Returns the requests after which `extra` tokens before each prompt cost as much as each
    investment, in device-hours.

    The low bound is a cheap investment against a dear prompt, the high bound the other way round.
    Costs are in device-hours where the device has no price. `tuning`: tokens that are tuned on.
    """
    prompt, answer, _ = lengths
    price = 1.0
    unit = "hours"
    if d.low:
        price = math.sqrt(d.low * d.high)
        unit = "dollars"
    each = longer_prompt(m, d, *PRECISIONS[precision], extra, prompt, answer)
    fit = fit_serving()
    lines = {method: hours.scaled(price, unit, hours.origin) for method, hours in investments.items()}
    for kind, words in (("computed", "without a prefix cache"), ("cached", "with a prefix cache")):
        cost = around(each[kind] / 3600 * price, fit.spread, unit, fit.origin)
        lines[f"the longer prompt of a request, {words}"] = cost
        for method in investments:
            bounds = (
                lines[method].low / cost.high,
                lines[method].middle / cost.middle,
                lines[method].high / cost.low,
            )
            lines[f"{method} pays after, {words}"] = interval(
                bounds, "requests", "what it costs over that of a request"
            )
    method = next(iter(investments))
    computed = lines[f"{method} pays after, without a prefix cache"]
    cached = lines[f"{method} pays after, with a prefix cache"]
    note = (
        f"Both cost the same at {in_words(computed.middle)} requests ({in_words(cached.middle)} cached). "
        f"By the bounds: put the {extra:,.0f} tokens into the prompt "
        f"while fewer than {in_words(computed.low)} requests are to come, "
        f"and into the weights by {method} beyond {in_words(computed.high)}; "
        f"with a prefix cache, {in_words(cached.low)} and {in_words(cached.high)}. "
        "That is computing alone: examples cost too, and how good answers are must be measured."
    )
    rent = f" at ${price:.3g} an hour" if d.low else ""
    question = f"{extra:,.0f} tokens more in each prompt of {name}, or in its weights"
    return PlannedAnswer(
        f"{question} by tuning on {in_words(tuning)} tokens, on {d.name}{rent}", lines, "", (note,)
    )

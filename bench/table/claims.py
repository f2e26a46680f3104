"""The usual statements about training and inference, each with its verdict and the numbers that decide it.

A verdict begins with true, false or partly, and is computed: another machine may give another one. Where the time it
needs is lost in noise, it is open.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from engine.format import in_words, money, percent, si, times

FINE_TUNING_TOKENS = 1_000_000
TOKENS_PER_PARAMETER = 20  # of a compute-optimal pre-training run (Hoffmann et al. 2022, 2203.15556, table 3)
NOISY = "open: lost in noise"
GENERATED_CHEAPER = "A token is cheaper to generate than to train on."

Over = Callable[[str, str], float | None]  # a row's time for a token over another's, None where noise hides it


@dataclasses.dataclass(frozen=True)
class Observed:
    """What was looked at beside the rows."""

    params: int
    neighbours: int  # other requests beside which a request was run again
    same_bits: bool  # whether its tokens and log-probabilities were the same to the bit each time
    generated: int  # tokens drawn between two evaluations
    bits_before: str  # the loss before and after, as hex
    bits_after: str
    digest_before: str
    digest_after: str
    uncached_seconds: float  # to get one more token by reading everything again: the timing "uncached"
    uncached_tokens: int
    bytes_a_weight: int  # of the plain rows
    int8_worst: float | None  # relative error of the logits, root mean square, of int8 against the compute type


def claims(rows: dict[str, dict[str, Any]], seen: Observed, price: float, over: Over) -> list[dict[str, Any]]:
    """The claims for the rows of a document, by name. A claim whose rows are missing is left out."""
    found = [
        _half(rows), _half_of_backward(rows), _half_of_lora(rows), _cheaper_per_token(rows, over), _some_layers(rows, over),
        _weights(rows), _independent(seen), _learns(seen), _money(rows, seen, price, over), _caching(rows, seen, over),
        _prefixes(rows, over), _batching(rows, over), _quantisation(rows, seen, over),
    ]  # fmt: skip
    return [claim for claim in found if claim]


def _claim(claim: str, verdict: str, value: str, **numbers: Any) -> dict[str, Any]:
    return {"claim": claim, "verdict": verdict, "value": value, "numbers": numbers}


def _named(rows: dict[str, dict[str, Any]], start: str) -> dict[str, Any] | None:
    return next((row for name, row in rows.items() if name.startswith(start)), None)


def _half(rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    step = _named(rows, "pre-training")
    if not step:
        return None
    flops, time = 1 / step["flop_ratio_to_forward"], _inverse(step["time_ratio_to_forward"])
    return _claim(
        "Inference is only half the computation of training.",
        "false: a third" if abs(flops - 1 / 3) < 0.02 else "partly: less than half",
        f"a forward pass is {percent(flops)} of a training step's FLOPs and {percent(time)} of its time.",
        flops=flops, time=time,
    )  # fmt: skip


def _half_of_backward(rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    step = _named(rows, "pre-training")
    if not step:
        return None
    parts = step["flops_per_token"]
    share = parts["forward"] / (parts["dx"] + parts["dw"])
    return _claim(
        "The backward pass costs about twice the forward pass.",
        "true" if abs(share - 0.5) < 0.02 else "partly",
        f"forward is {percent(share)} of backward alone: one product forward, two back (for the input and for the weight).",
        flops=share,
    )


def _half_of_lora(rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    lora = _named(rows, "LoRA")
    if not lora:
        return None
    flops, time = 1 / lora["flop_ratio_to_forward"], _inverse(lora["time_ratio_to_forward"])
    return _claim(
        "Half is right for one kind of training: a LoRA step.",
        "true" if abs(flops - 0.5) < 0.03 else "partly",
        f"a forward pass is {percent(flops)} of a LoRA step's FLOPs and {percent(time)} of its time: nothing is computed for "
        "the weights of the base, but the gradient still passes through them.",
        flops=flops, time=time,
    )  # fmt: skip


def _cheaper_per_token(rows: dict[str, dict[str, Any]], over: Over) -> dict[str, Any] | None:
    step, lone = _named(rows, "pre-training"), _named(rows, "decode alone")
    if not step or not lone:
        return None
    ratio = over(lone["name"], step["name"])
    return _claim(
        GENERATED_CHEAPER,
        NOISY if ratio is None else "false for a lone request" if ratio > 1 else "true here",
        f"decoding alone takes {si(lone['seconds_per_token'], 's')} a token and a training step "
        f"{si(step['seconds_per_token'], 's')}: {times(ratio)} the time for "
        f"{times(lone['flop_ratio_to_forward'] / step['flop_ratio_to_forward'])} the operations. "
        "Training multiplies thousands of tokens by a weight at once, a lone stream one.",
        time=ratio,
    )  # fmt: skip


def _some_layers(rows: dict[str, dict[str, Any]], over: Over) -> dict[str, Any] | None:
    full, bottom, top = (_named(rows, name) for name in ("full fine-tuning", "bottom half", "top half"))
    if not (full and bottom and top):
        return None
    numbers: dict[str, dict[str, float | None]] = {}
    for name, row in (("bottom", bottom), ("top", top)):
        flops = row["flops_per_token"]["formula"] / full["flops_per_token"]["formula"]
        numbers[name] = {"flops": flops, "time": over(row["name"], full["name"])}
    said = [
        f"{name} half frozen {percent(both['flops'])} of the FLOPs, {percent(both['time'])} of the time"
        for name, both in numbers.items()
    ]
    return _claim(
        "Fine-tuning is cheaper because only some layers are updated.",
        "partly: it matters which",
        f"against full fine-tuning: {'; '.join(said)}. Below the lowest weight that learns no gradient is needed; above it, "
        "every one is.",
        **numbers,
    )


def _weights(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kinds = {
        kind: [row["name"] for row in rows.values() if row["weights"] == kind] for kind in ("changed", "partly", "identical")
    }
    forward_only = [row for row in rows.values() if row["stage"] in ("inference", "decode")]
    sound = all(row["weights"] == "identical" for row in forward_only)
    return _claim(
        "Weights change in training, partly in fine-tuning, never in inference.",
        "true" if sound else "false here, which is a defect",
        "by SHA-256 of every leaf before and after: "
        + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        + ".",
        **{kind: len(names) for kind, names in kinds.items()},
    )


def _independent(seen: Observed) -> dict[str, Any]:
    return _claim(
        "Requests do not affect one another.",
        "true" if seen.same_bits else "false here, which is a defect",
        f"one prompt, alone and beside {seen.neighbours} others in each slot in turn: "
        + ("the same tokens and the same log-probabilities to the last bit." if seen.same_bits else "its bits differed."),
        same_bits=seen.same_bits,
    )


def _learns(seen: Observed) -> dict[str, Any]:
    same = seen.bits_before == seen.bits_after and seen.digest_before == seen.digest_after
    before, after = (f"{float.fromhex(bits):.4f} ({bits})" for bits in (seen.bits_before, seen.bits_after))
    value = (
        f"{before} nats a token and the weights {seen.digest_before[:12]}, before and after, to the last bit."
        if same
        else f"{before} before and {after} after, the weights {seen.digest_before[:12]} and {seen.digest_after[:12]}."
    )
    return _claim(
        "The model improves as you use it.",
        "false" if same else "true here, which is a defect",
        f"{seen.generated:,} tokens were generated; the loss on a text is {value}",
        same=same,
    )


def _money(rows: dict[str, dict[str, Any]], seen: Observed, price: float, over: Over) -> dict[str, Any] | None:
    step, lora = _named(rows, "pre-training"), _named(rows, "LoRA")
    decode = _named(rows, "decode with 8 slots")
    if not (step and lora and decode):
        return None
    tokens = TOKENS_PER_PARAMETER * seen.params
    cost = lambda row, tokens: row["seconds_per_token"] * tokens / 3600 * price
    whole, some = cost(step, tokens), cost(lora, FINE_TUNING_TOKENS)
    crossing = whole / (cost(decode, 1) or 1)
    return _claim(
        "Fine-tuning costs a small part of what training cost.",
        "true: the data are fewer" if some < 0.1 * whole else "partly: not for so small a model",
        f"pre-training on {in_words(tokens)} tokens ({TOKENS_PER_PARAMETER} a parameter) {money(whole)}, LoRA on "
        f"{in_words(FINE_TUNING_TOKENS)} tokens {money(some)}, at {money(price)} an hour. A token of LoRA costs "
        f"{percent(over(lora['name'], step['name']))} of one of pre-training; the rest is the amount. "
        f"Serving, eight at a time, has cost as much as training after {in_words(crossing)} tokens.",
        training_usd=whole, fine_tuning_usd=some, serving_tokens_that_cost_as_much=crossing,
    )  # fmt: skip


def _caching(rows: dict[str, dict[str, Any]], seen: Observed, over: Over) -> dict[str, Any] | None:
    lone = _named(rows, "decode alone")
    if not lone:
        return None
    ratio = over("uncached", lone["name"])
    return _claim(
        "Caching decides what serving costs.",
        _verdict(ratio),
        f"one more token behind {seen.uncached_tokens} takes {si(seen.uncached_seconds, 's')} without a cache and "
        f"{si(lone['seconds_per_token'], 's')} with one: {times(ratio)}.",
        off_over_on=ratio,
    )


def _prefixes(rows: dict[str, dict[str, Any]], over: Over) -> dict[str, Any] | None:
    read, found = _named(rows, "prompt read"), _named(rows, "prompt found")
    if not (read and found):
        return None
    ratio = over(read["name"], found["name"])
    return _claim(
        "So does keeping what prompts have in common.",
        _verdict(ratio),
        f"a prompt's token takes {si(read['seconds_per_token'], 's')} to read, and {si(found['seconds_per_token'], 's')} to "
        f"put in place where a prompt that began alike was read before: {times(ratio)}.",
        off_over_on=ratio,
    )


def _batching(rows: dict[str, dict[str, Any]], over: Over) -> dict[str, Any] | None:
    lone, eight, many = (_named(rows, f"decode {how}") for how in ("alone", "with 8 slots", "with 32 slots"))
    if not (lone and eight and many):
        return None
    ratio = over(lone["name"], many["name"])
    each = [si(row["seconds_per_token"], "s") for row in (lone, eight, many)]
    return _claim(
        "Batching decides what serving costs.",
        _verdict(ratio),
        f"a token takes {each[0]} alone, {each[1]} among 8 and {each[2]} among 32: {times(ratio)}.",
        off_over_on=ratio,
    )


def _quantisation(rows: dict[str, dict[str, Any]], seen: Observed, over: Over) -> dict[str, Any] | None:
    found = []
    for number in (8, 32):
        plain, small = _named(rows, f"decode with {number} slots"), _named(rows, f"decode with {number}, int8")
        if plain and small:
            found.append((number, plain, small, over(plain["name"], small["name"])))
    if not found:
        return None
    said = [
        f"among {number}, a token takes {si(plain['seconds_per_token'], 's')} with weights in {seen.bytes_a_weight} bytes and "
        f"{si(small['seconds_per_token'], 's')} in one: {times(ratio)}"
        for number, plain, small, ratio in found
    ]
    error = "" if seen.int8_worst is None else f" The logits move by {percent(seen.int8_worst)} of their spread."
    known = [ratio for _, _, _, ratio in found if ratio is not None]
    return _claim(
        "Quantisation decides what serving costs.",
        _verdict(max(known, default=None)),
        f"{'; '.join(said)}.{error}",
        off_over_on={str(number): ratio for number, _, _, ratio in found},
    )


def _verdict(gain: float | None) -> str:
    if gain is None:
        return NOISY
    if gain > 1.25:
        return "true"
    return "partly: little for this model here" if gain > 1.02 else "false for this model here"


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value

"""The usual statements about training and inference, each with its verdict and the numbers that decide it.

A verdict begins with true, false or partly, and is computed: another machine may give another one. Where the time it
needs is lost in noise, it is open.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from engine.format import in_words, money, percent, si, times

FINE_TUNING_TOKENS = 1_000_000
TOKENS_PER_PARAMETER = 20  # of a compute-optimal pre-training run (Hoffmann et al. 2022, 2203.15556, table 3)
NOISY = "open: lost in noise"
DEFECT = "here, which is a defect"
GENERATED_CHEAPER = "A token is cheaper to generate than to train on."
SERVING = "decides what serving costs."

Row = dict[str, Any]
Claim = dict[str, Any]
Over = Callable[[str, str], float | None]  # a row's time for a token over another's, None where noise hides it


@dataclasses.dataclass(frozen=True)
class Invariants:
    """The results of the checks that time does not show."""

    neighbours: int  # other requests beside which a request was run again
    same_bits: bool  # whether its tokens and log-probabilities were the same to the bit each time
    generated: int  # tokens generated between two evaluations
    bits_before: str  # the loss before and after, as hex
    bits_after: str
    digest_before: str
    digest_after: str
    int8_error: float | None  # relative error of the logits, root mean square, of int8 against the compute type


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The numbers that claims are decided by: the rows of a document by name, their times over one another, the checks."""

    rows: dict[str, Row]
    over: Over
    invariants: Invariants
    params: int
    price: float  # dollars an hour
    uncached: tuple[float, int]  # seconds of one more token behind so many by reading all again: the timing "uncached"
    weight_bytes: int  # of one weight in the plain rows

    def __getitem__(self, start: str) -> Row:
        """Returns the first row whose name starts so. Raises KeyError when there is none."""
        for name, row in self.rows.items():
            if name.startswith(start):
                return row
        raise KeyError(start)


def claims(evidence: Evidence) -> list[Claim]:
    """Returns the claims, decided. A claim whose rows are missing is left out."""
    decided: list[Claim] = []
    for claim in (
        _half, _half_of_backward, _half_of_lora, _cheaper_per_token, _some_layers, _weights, _independent, _learns, _money,
        _caching, _prefix_cache, _batching, _quantisation,
    ):  # fmt: skip
        with contextlib.suppress(KeyError):
            decided.append(claim(evidence))
    return decided


def _claim(claim: str, verdict: str, value: str, **numbers: Any) -> Claim:
    return {"claim": claim, "verdict": verdict, "value": value, "numbers": numbers}


def _half(evidence: Evidence) -> Claim:
    flops, time = _forward_share(evidence["pre-training"])
    return _claim(
        "Inference is only half the computation of training.",
        "false: a third" if abs(flops - 1 / 3) < 0.02 else "partly: less than half",
        f"a forward pass is {percent(flops)} of a training step's FLOPs and {percent(time)} of its time.",
        flops=flops, time=time,
    )  # fmt: skip


def _half_of_backward(evidence: Evidence) -> Claim:
    parts = evidence["pre-training"]["flops_per_token"]
    share = parts["forward"] / (parts["dx"] + parts["dw"])
    return _claim(
        "The backward pass costs about twice the forward pass.",
        "true" if abs(share - 0.5) < 0.02 else "partly",
        f"forward is {percent(share)} of backward alone: one product forward, two back (for the input and for the weight).",
        flops=share,
    )


def _half_of_lora(evidence: Evidence) -> Claim:
    flops, time = _forward_share(evidence["LoRA"])
    return _claim(
        "Half is right for one kind of training: a LoRA step.",
        "true" if abs(flops - 0.5) < 0.03 else "partly",
        f"a forward pass is {percent(flops)} of a LoRA step's FLOPs and {percent(time)} of its time: nothing is computed for "
        "the weights of the base, but the gradient still passes through them.",
        flops=flops, time=time,
    )  # fmt: skip


def _cheaper_per_token(evidence: Evidence) -> Claim:
    step, lone = evidence["pre-training"], evidence["decode alone"]
    ratio = evidence.over(lone["name"], step["name"])
    return _claim(
        GENERATED_CHEAPER,
        NOISY if ratio is None else "false for a lone request" if ratio > 1 else "true here",
        f"decoding alone takes {_seconds(lone)} a token and a training step {_seconds(step)}: {times(ratio)} the time for "
        f"{times(lone['flop_ratio_to_forward'] / step['flop_ratio_to_forward'])} the operations. "
        "Training multiplies thousands of tokens by a weight at once, a lone stream one.",
        time=ratio,
    )  # fmt: skip


def _some_layers(evidence: Evidence) -> Claim:
    full = evidence["full fine-tuning"]
    numbers: dict[str, dict[str, float | None]] = {}
    for half in ("bottom", "top"):
        row = evidence[f"{half} half"]
        flops = row["flops_per_token"]["formula"] / full["flops_per_token"]["formula"]
        numbers[half] = {"flops": flops, "time": evidence.over(row["name"], full["name"])}
    shares = [
        f"{half} half frozen {percent(both['flops'])} of the FLOPs, {percent(both['time'])} of the time"
        for half, both in numbers.items()
    ]
    return _claim(
        "Fine-tuning is cheaper because only some layers are updated.",
        "partly: it matters which",
        f"against full fine-tuning: {'; '.join(shares)}. Below the lowest weight that trains no gradient is needed; above it, "
        "every one is.",
        **numbers,
    )


def _weights(evidence: Evidence) -> Claim:
    rows = evidence.rows.values()
    kinds = {kind: [row["name"] for row in rows if row["weights"] == kind] for kind in ("changed", "partly", "identical")}
    sound = all(row["weights"] == "identical" for row in rows if row["stage"] in ("inference", "decode"))
    names = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    return _claim(
        "Weights change in training, partly in fine-tuning, never in inference.",
        "true" if sound else f"false {DEFECT}",
        f"by SHA-256 of every leaf before and after: {names}.",
        **{kind: len(names) for kind, names in kinds.items()},
    )


def _independent(evidence: Evidence) -> Claim:
    same = evidence.invariants.same_bits
    return _claim(
        "Requests do not affect one another.",
        "true" if same else f"false {DEFECT}",
        f"one prompt, alone and beside {evidence.invariants.neighbours} others in each slot in turn: "
        + ("the same tokens and the same log-probabilities to the last bit." if same else "its bits differed."),
        same_bits=same,
    )


def _learns(evidence: Evidence) -> Claim:
    checks = evidence.invariants
    same = checks.bits_before == checks.bits_after and checks.digest_before == checks.digest_after
    before, after = (f"{float.fromhex(bits):.4f} ({bits})" for bits in (checks.bits_before, checks.bits_after))
    value = (
        f"{before} nats a token and the weights {checks.digest_before[:12]}, before and after, to the last bit."
        if same
        else f"{before} before and {after} after, the weights {checks.digest_before[:12]} and {checks.digest_after[:12]}."
    )
    return _claim(
        "The model improves as you use it.",
        "false" if same else f"true {DEFECT}",
        f"{checks.generated:,} tokens were generated; the loss on a text is {value}",
        same=same,
    )


def _money(evidence: Evidence) -> Claim:
    step, lora, decode = evidence["pre-training"], evidence["LoRA"], evidence["decode with 8 slots"]
    tokens = TOKENS_PER_PARAMETER * evidence.params
    cost = lambda row, tokens: row["seconds_per_token"] * tokens / 3600 * evidence.price
    training, tuning = cost(step, tokens), cost(lora, FINE_TUNING_TOKENS)
    crossing = training / (cost(decode, 1) or 1)
    return _claim(
        "Fine-tuning costs a small part of what training cost.",
        "true: the data are fewer" if tuning < 0.1 * training else "partly: not for so small a model",
        f"pre-training on {in_words(tokens)} tokens ({TOKENS_PER_PARAMETER} a parameter) {money(training)}, LoRA on "
        f"{in_words(FINE_TUNING_TOKENS)} tokens {money(tuning)}, at {money(evidence.price)} an hour. A token of LoRA costs "
        f"{percent(evidence.over(lora['name'], step['name']))} of one of pre-training; the rest is the amount. "
        f"Serving, eight at a time, has cost as much as training after {in_words(crossing)} tokens.",
        training_usd=training, fine_tuning_usd=tuning, serving_tokens_that_cost_as_much=crossing,
    )  # fmt: skip


def _caching(evidence: Evidence) -> Claim:
    lone, (seconds, tokens) = evidence["decode alone"], evidence.uncached
    text = f"one more token behind {tokens} takes {si(seconds, 's')} without a cache and {_seconds(lone)} with one"
    return _serving("The KV cache", evidence.over("uncached", lone["name"]), text)


def _prefix_cache(evidence: Evidence) -> Claim:
    prefill, hit = evidence["chunked prefill"], evidence["prefix-cache hit"]
    text = (
        f"a prompt's token takes {_seconds(prefill)} to prefill, and {_seconds(hit)} to copy into its slot where a prompt that "
        "began alike was read before"
    )
    return _serving("The prefix cache", evidence.over(prefill["name"], hit["name"]), text)


def _batching(evidence: Evidence) -> Claim:
    lone, eight, many = (evidence[f"decode {how}"] for how in ("alone", "with 8 slots", "with 32 slots"))
    text = f"a token takes {_seconds(lone)} alone, {_seconds(eight)} among 8 and {_seconds(many)} among 32"
    return _serving("Batching", evidence.over(lone["name"], many["name"]), text)


def _serving(part: str, ratio: float | None, text: str) -> Claim:
    """Returns the claim on a part of serving by its time without the part over its time with it."""
    return _claim(f"{part} {SERVING}", _verdict(ratio), f"{text}: {times(ratio)}.", off_over_on=ratio)


def _quantisation(evidence: Evidence) -> Claim:
    gains: dict[str, float | None] = {}
    sentences = []
    for slots in (8, 32):
        with contextlib.suppress(KeyError):
            plain, int8 = evidence[f"decode with {slots} slots"], evidence[f"decode with {slots}, int8"]
            gains[str(slots)] = ratio = evidence.over(plain["name"], int8["name"])
            sentences.append(
                f"among {slots}, a token takes {_seconds(plain)} with weights in {evidence.weight_bytes} bytes and "
                f"{_seconds(int8)} in one: {times(ratio)}"
            )
    if not gains:
        raise KeyError("int8")
    error = evidence.invariants.int8_error
    return _claim(
        f"Quantisation {SERVING}",
        _verdict(max((gain for gain in gains.values() if gain is not None), default=None)),
        f"{'; '.join(sentences)}.{'' if error is None else f' The logits move by {percent(error)} of their spread.'}",
        off_over_on=gains,
    )


def _verdict(gain: float | None) -> str:
    if gain is None:
        return NOISY
    if gain > 1.25:
        return "true"
    return "partly: little for this model here" if gain > 1.02 else "false for this model here"


def _seconds(row: Row) -> str:
    return si(row["seconds_per_token"], "s")


def _forward_share(row: Row) -> tuple[float, float | None]:
    """Returns the forward pass as a share of a row's FLOPs and of its time, None where noise hides the latter."""
    time = row["time_ratio_to_forward"]
    return 1 / row["flop_ratio_to_forward"], None if time is None else 1 / time

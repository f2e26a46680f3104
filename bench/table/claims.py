"""Judges common claims about training and inference by the numbers of a run, as claims.toml says."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from bench.table.sentences import read_templates, render

TUNING_TOKENS = 1_000_000
TOKENS_PER_PARAMETER = 20  # of a compute-optimal pre-training run (Hoffmann et al. 2022, 2203.15556, table 3)
TEXTS: dict[str, dict[str, str]] = read_templates("claims")
GENERATED_CHEAPER = TEXTS["generated_cheaper"]["claim"]
# Claims on a part of serving: the rows without and with it.
SERVING = {
    "caching": ("uncached", "decode alone"), "prefix_cache": ("chunked prefill into a slot", "prefix-cache hit"),
    "batching": ("decode alone", "decode with 32 slots"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class InferenceChecks:
    """Whether a request's bits stay beside others, loss and weights before and after inference, and int8's error in logits."""

    neighbours: int  # other requests beside which a request ran again
    same_bits: bool  # of its tokens and log-probabilities each time
    generated: int  # tokens between two evaluations
    before: tuple[str, str]  # the loss, as hex, and the digest of the weights
    after: tuple[str, str]
    int8_error: float | None  # of the logits, root mean square, as a share of their spread


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The numbers by which claims are judged."""

    rows: dict[str, dict[str, Any]]  # of the document, by name
    time_ratio: Callable[[str, str], float | None]  # a row's time for a token over another's, None where noise hides it
    checks: InferenceChecks
    params: int
    price: float  # dollars an hour
    uncached: tuple[float, int]  # seconds of a token without a KV cache, and the tokens before it
    bytes_per_weight: int  # in the rows that are not int8

    def row(self, start: str) -> dict[str, Any]:
        """Returns the first row whose name begins with `start`, or raises KeyError."""
        return self.rows[next((name for name in self.rows if name.startswith(start)), start)]

    def ratio(self, a: str, b: str) -> float | None:
        """Returns `time_ratio` of the `row` of `a` and of `b`."""
        return self.time_ratio(self.row(a)["name"], self.row(b)["name"])


def claims(evidence: Evidence) -> list[dict[str, Any]]:
    """Judges the claims: returns them with verdicts, without those whose rows are missing."""
    known = {
        "evidence": evidence, "checks": evidence.checks, "row": evidence.row, "ratio": evidence.ratio,
        "per_parameter": TOKENS_PER_PARAMETER, "tuning_tokens": TUNING_TOKENS, "gain_verdict": _gain_verdict,
    }  # fmt: skip
    decided = []
    for name, text in TEXTS.items():
        with contextlib.suppress(KeyError):
            numbers = _numbers(name, evidence)
            verdict, value = (render(text[part], known | numbers | {"numbers": numbers}) for part in ("verdict", "value"))
            decided.append({"claim": text["claim"], "verdict": verdict, "value": value, "numbers": numbers})
    return decided


def _numbers(name: str, evidence: Evidence) -> dict[str, Any]:
    """Returns the numbers that decide a claim. Raises KeyError for a missing row."""
    row, checks = evidence.row, evidence.checks
    match name:
        case "half" | "half_of_lora":
            step = row("LoRA" if name == "half_of_lora" else "pre-training")
            time = step["time_ratio_to_forward"]
            return {"flops": 1 / step["flop_ratio_to_forward"], "time": time and 1 / time}
        case "half_of_backward":
            parts = row("pre-training")["flops_per_token"]
            return {"flops": parts["forward"] / (parts["dx"] + parts["dw"])}
        case "generated_cheaper":
            return {"time": evidence.ratio("decode alone", "pre-training")}
        case "some_layers":
            flops_of = lambda start: row(start)["flops_per_token"]["formula"]
            return {
                half: {
                    "flops": flops_of(f"{half} half") / flops_of("full fine-tuning"),
                    "time": evidence.ratio(f"{half} half", "full fine-tuning"),
                }
                for half in ("bottom", "top")
            }
        case "weights":
            changes = [row["weights"] for row in evidence.rows.values()]
            return {change: changes.count(change) for change in ("changed", "partly", "identical")}
        case "independent":
            return {"same_bits": checks.same_bits}
        case "learns":
            return {"same": checks.before == checks.after}
        case "money":
            cost = lambda start, tokens: row(start)["seconds_per_token"] * tokens / 3600 * evidence.price
            training = cost("pre-training", TOKENS_PER_PARAMETER * evidence.params)
            return {
                "training_usd": training, "fine_tuning_usd": cost("LoRA", TUNING_TOKENS),
                "serving_tokens_that_cost_as_much": training / (cost("decode with 8 slots", 1) or 1),
            }  # fmt: skip
        case "quantisation":
            gains: dict[str, float | None] = {}
            for slots in ("8", "32"):
                with contextlib.suppress(KeyError):
                    gains[slots] = evidence.ratio(f"decode with {slots} slots", f"decode with {slots}, int8")
            if not gains:
                raise KeyError("int8")
            return {"off_over_on": gains}
        case _:
            return {"off_over_on": evidence.time_ratio(*SERVING[name])}


def _gain_verdict(gain: float | None) -> str:
    if gain is None:
        return "open: lost in noise"
    if gain > 1.25:
        return "true"
    return "partly: little for this model here" if gain > 1.02 else "false for this model here"

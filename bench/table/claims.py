"""Judges common claims about training and inference by the numbers of a run, as claims.toml says."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from bench.table.sentences import read_templates, render
from bench.timing import Ratio

TUNING_TOKENS = 1_000_000  # of a fine-tuning run
SMALL_PART = 0.1  # share of the cost of pre-training that a fine-tuning run may have
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
    time_ratio: Callable[[str, str], Ratio]  # of a row's time for a token over another's
    checks: InferenceChecks
    params: int
    price: float  # dollars an hour
    uncached: tuple[float, int]  # seconds of a token without a KV cache, and the tokens before it
    bytes_per_weight: int  # in the rows that are not int8

    def row(self, start: str) -> dict[str, Any]:
        """Returns the first row whose name begins with `start`, or raises KeyError."""
        return self.rows[next((name for name in self.rows if name.startswith(start)), start)]

    def ratio(self, a: str, b: str) -> Ratio:
        """Returns `time_ratio` of the `row` of `a` and of `b`."""
        return self.time_ratio(self.row(a)["name"], self.row(b)["name"])


def claims(evidence: Evidence) -> list[dict[str, Any]]:
    """Judges the claims: returns them with verdicts, without those whose rows are missing."""
    variables = {
        "evidence": evidence, "checks": evidence.checks, "row": evidence.row, "judge": judge, "judge_gain": judge_gain,
        "per_parameter": TOKENS_PER_PARAMETER, "tuning_tokens": TUNING_TOKENS, "small_part": SMALL_PART,
    }  # fmt: skip
    judged = []
    for name, text in TEXTS.items():
        with contextlib.suppress(KeyError):
            numbers = _numbers(name, evidence)
            verdict, value = (render(text[part], variables | numbers | {"numbers": numbers}) for part in ("verdict", "value"))
            judged.append({"claim": text["claim"], "verdict": verdict, "value": value, "numbers": _plain(numbers)})
    return judged


def judge(ratio: Ratio, threshold: float, above: str, below: str) -> str:
    """Returns the verdict `above` or `below` the threshold, or that this measurement does not decide between them."""
    match ratio.exceeds(threshold):
        case None:
            why = f"{ratio} may lie on either side of {threshold:g}" if ratio.low is not None else str(ratio)
            return f"undecided on this machine: {why}"
        case is_above:
            return above if is_above else below


def judge_gain(gains: dict[str, Ratio] | Ratio) -> str:
    """Returns the verdict on a part of serving: on its gain, or on gains by numbers of slots, of which each counts."""
    if isinstance(gains, Ratio):
        little = judge(gains, 1.02, "partly: little for this model here", "false for this model here")
        return judge(gains, 1.25, "true", little)
    verdicts = {slots: judge_gain(gain) for slots, gain in gains.items()}
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    undecided = [f"{verdict} (among {slots})" for slots, verdict in verdicts.items() if verdict.startswith("undecided")]
    by_slots = "; ".join(f"among {slots} {verdict}" for slots, verdict in verdicts.items())
    return undecided[0] if undecided else f"partly: {by_slots}"


def _numbers(name: str, evidence: Evidence) -> dict[str, Any]:
    """Returns the numbers that decide a claim. Raises KeyError for a missing row."""
    row, checks = evidence.row, evidence.checks
    match name:
        case "half" | "half_of_lora":
            step = "LoRA" if name == "half_of_lora" else "pre-training"
            return {"flops": 1 / row(step)["flop_ratio_to_forward"], "time": evidence.ratio("evaluation forward", step)}
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
        case "six":
            parts = row("pre-training")["flops_per_token"]
            return {"optimizer": parts["optimizer"] / parts["formula"], "back": (parts["dx"] + parts["dw"]) / parts["forward"]}
        case "life":
            training, served = (row(name)["flops_per_token"]["formula"] for name in ("pre-training", "decode with 8 slots"))
            trained_tokens = TOKENS_PER_PARAMETER * evidence.params
            return {"trained_tokens": trained_tokens, "served_tokens": trained_tokens * training / served}
        case "lora_memory":
            return {"left": row("LoRA")["peak_bytes"] / row("full fine-tuning")["peak_bytes"]}
        case "last_layers":
            flops = row("last layer")["flops_per_token"]["formula"] / row("full fine-tuning")["flops_per_token"]["formula"]
            return {"flops": flops, "time": evidence.ratio("last layer", "full fine-tuning")}
        case "more_slots":
            return {"gain": evidence.ratio("decode with 8 slots", "decode with 32 slots")}
        case "weights":
            changes = [row["weights"] for row in evidence.rows.values()]
            return {change: changes.count(change) for change in ("changed", "partly", "identical")}
        case "independent":
            return {"same_bits": checks.same_bits}
        case "learns":
            return {"same": checks.before == checks.after}
        case "money":
            cost = lambda start, tokens: row(start)["seconds_per_token"] * tokens / 3600 * evidence.price
            training_tokens = TOKENS_PER_PARAMETER * evidence.params
            training, token_share = cost("pre-training", training_tokens), evidence.ratio("LoRA", "pre-training")
            return {
                "token_share": token_share, "share": token_share.scaled(TUNING_TOKENS / training_tokens),
                "training_usd": training, "fine_tuning_usd": cost("LoRA", TUNING_TOKENS),
                "serving_tokens_that_cost_as_much": training / (cost("decode with 8 slots", 1) or 1),
            }  # fmt: skip
        case "quantisation":
            gains: dict[str, Ratio] = {}
            for slots in ("8", "32"):
                with contextlib.suppress(KeyError):
                    gains[slots] = evidence.ratio(f"decode with {slots} slots", f"decode with {slots}, int8")
            if not gains:
                raise KeyError("int8")
            return {"off_over_on": gains}
        case _:
            return {"off_over_on": evidence.time_ratio(*SERVING[name])}


def _plain(numbers: Any) -> Any:
    """Returns the numbers as JSON has them, each ratio as an object of its own."""
    if isinstance(numbers, Ratio):
        return numbers.fields()
    return {name: _plain(value) for name, value in numbers.items()} if isinstance(numbers, dict) else numbers

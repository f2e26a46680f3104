"""Judges common claims about training and inference by the numbers of a run.

A claim is a function of the evidence that returns a verdict, the numbers that decide it in words,
and these numbers. A verdict begins with true, false or partly, or with undecided where the interval
of a ratio of times holds the threshold. It may differ on another machine.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from bench.stages.checks import SLOTS
from bench.stages.learning import LEAST, MOST
from bench.timing import Ratio, Timing, ratio
from engine.format import in_words, money, percent, si, times

TUNING_TOKENS = 1_000_000  # of a fine-tuning run
SMALL_PART = 0.1  # share of the cost of pre-training that a fine-tuning run may have
# of a compute-optimal pre-training run (Hoffmann et al. 2022, 2203.15556, table 3)
TOKENS_PER_PARAMETER = 20
PROMPT = 500  # tokens of a request
COMPLETION = 250  # tokens of its answer
MANY = 10_000  # requests that cost as much as pre-training: then one of them costs next to nothing
# GPT-2 took 32 TPUs for 168 hours at 8 dollars in 2019 (karpathy/nanochat, dev/LEADERBOARD.md).
GPT2_USD = 32 * 168 * 8
# So many operations nanochat's first run to a model as able took in 2026 (the same page).
GPT2_FLOPS = 4.33e19
# That run took 10,949 seconds of eight H100s, which are 24 dollars an hour by nanochat's README.
H100S_USD = 10_949 / 3600 * 24

Judgement = tuple[str, str, dict[str, Any]]  # verdict, numbers in words, numbers


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The numbers by which claims are judged. Its methods find a row by the beginning of its name,
    or raise KeyError.
    """

    command: str  # that measures them
    rows: dict[str, dict[str, Any]]  # of the document, by name
    timings: Mapping[str, Timing]  # of a token in each row, by name, and of one without a KV cache
    params: int
    price: float  # dollars an hour
    uncached_tokens: int  # before one without a KV cache
    bytes_per_weight: int  # in the rows that are not int8
    # of a request in each slot: other tokens or bits of log-probabilities beside others than alone
    changed_answers: int
    generated: int  # tokens between two evaluations
    before: tuple[str, str]  # the loss, as hex, and the digest of the weights
    after: tuple[str, str]
    int8_error: float  # of the logits, root mean square, as a share of their spread
    learning: Mapping[str, Any]  # what `measure_learning` returns; empty where it did not run

    def row(self, start: str) -> dict[str, Any]:
        for name, row in self.rows.items():
            if name.startswith(start):
                return row
        raise KeyError(start)

    def seconds(self, start: str) -> str:
        """Returns those of a token in words."""
        return si(self.row(start)["seconds_per_token"], "s")

    def flops(self, start: str) -> float:
        """Returns those of a token by formula."""
        return self.row(start)["flops_per_token"]["formula"]

    def timing(self, start: str) -> Timing:
        """Returns that of a token; `start` may be `uncached` too."""
        if start == "uncached":
            return self.timings["uncached"]
        return self.timings[self.row(start)["name"]]

    def ratio(self, a: str, b: str) -> Ratio:
        """Returns a token's time in `a` over that in `b`."""
        return ratio(self.timing(a), self.timing(b))

    @property
    def pretraining(self) -> int:
        """The tokens of this model's pre-training."""
        return TOKENS_PER_PARAMETER * self.params

    def usd(self, seconds: float) -> float:
        return seconds / 3600 * self.price


def claims(evidence: Evidence) -> list[dict[str, Any]]:
    """Judges the claims: returns them with verdicts, without those whose rows are missing."""
    judged = []
    for claim, judgement in CLAIMS.items():
        with contextlib.suppress(KeyError):
            verdict, value, numbers = judgement(evidence)
            command = evidence.command
            if judgement in OF_LEARNING:
                command += " --out FOLDER"
            row = {"claim": claim, "verdict": verdict, "value": value}
            judged.append(row | {"numbers": _plain(numbers), "command": command})
    return judged


def judge(ratio: Ratio, threshold: float, above: str, below: str) -> str:
    """Returns the verdict `above` or `below` the threshold, or that this measurement does not
    decide between them.
    """
    is_above = ratio.exceeds(threshold)
    if is_above is not None:
        return above if is_above else below
    why = str(ratio)
    if ratio.low is not None:
        why += f" may lie on either side of {threshold:g}"
    return f"undecided on this machine: {why}"


def judge_gain(gains: dict[str, Ratio] | Ratio) -> str:
    """Returns the verdict on a part of serving: on its gain, or on gains by numbers of slots, of
    which each counts.
    """
    if isinstance(gains, Ratio):
        little = judge(gains, 1.02, "partly: little for this model here", "false for this model here")
        return judge(gains, 1.25, "true", little)
    verdicts = {slots: judge_gain(gain) for slots, gain in gains.items()}
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    for slots, verdict in verdicts.items():
        if verdict.startswith("undecided"):
            return f"{verdict} (among {slots})"
    by_slots = "; ".join(f"among {slots} {verdict}" for slots, verdict in verdicts.items())
    return f"partly: {by_slots}"


def half(of: Evidence) -> Judgement:
    flops, time = _of_step(of, "pre-training")
    if abs(flops - 1 / 3) < 0.02:
        verdict = "false: a third"
    else:
        verdict = "partly: less than half"
    value = f"a forward pass is {percent(flops)} of a training step's operations and {time.format(percent)} of its time."
    return verdict, value, {"flops": flops, "time": time}


def half_of_backward(of: Evidence) -> Judgement:
    parts = of.row("pre-training")["flops_per_token"]
    flops = parts["forward"] / (parts["dx"] + parts["dw"])
    value = (
        f"the forward pass takes {percent(flops)} of the backward pass's operations: "
        "one product forward, two back, for the input and for the weight."
    )
    return _true_if(abs(flops - 0.5) < 0.02), value, {"flops": flops}


def half_of_lora(of: Evidence) -> Judgement:
    flops, time = _of_step(of, "LoRA")
    value = (
        f"a forward pass is {percent(flops)} of a LoRA step's operations "
        f"and {time.format(percent)} of its time: "
        "nothing is computed for the weights of the base, but the gradient still passes through them."
    )
    return _true_if(abs(flops - 0.5) < 0.03), value, {"flops": flops, "time": time}


def _of_step(of: Evidence, step: str) -> tuple[float, Ratio]:
    return 1 / of.row(step)["flop_ratio_to_forward"], of.ratio("evaluation forward", step)


def six(of: Evidence) -> Judgement:
    parts = of.row("pre-training")["flops_per_token"]
    optimizer = parts["optimizer"] / parts["formula"]
    back = (parts["dx"] + parts["dw"]) / parts["forward"]
    value = (
        "6 N D, the usual estimate of training, is six operations for each of N weights and D tokens. "
        f"The optimizer's add {100 * optimizer:.2f}% to those of both passes. "
        f"Backward alone is {times(back)} forward: "
        "two for the gradient of the input, two for that of the weight."
    )
    verdict = "false" if optimizer < 0.02 and abs(back - 2) < 0.2 else "partly"
    return verdict, value, {"optimizer": optimizer, "back": back}


def life(of: Evidence) -> Judgement:
    training_tokens = of.pretraining
    served_tokens = training_tokens * of.flops("pre-training") / of.flops("decode with 8 slots")
    value = (
        f"pre-training on {in_words(training_tokens)} tokens ({TOKENS_PER_PARAMETER} a parameter) "
        f"takes as many operations as serving {in_words(served_tokens)}; "
        "below that, training is most of them."
    )
    verdict = f"partly: after {in_words(served_tokens)} tokens served"
    return verdict, value, {"trained_tokens": training_tokens, "served_tokens": served_tokens}


def lora_memory(of: Evidence) -> Judgement:
    left = of.row("LoRA")["peak_bytes"] / of.row("full fine-tuning")["peak_bytes"]
    value = (
        f"a LoRA step peaks at {percent(left)} of full fine-tuning's memory: "
        "the gradients and the optimizer's numbers go, what each block keeps for the backward pass stays."
    )
    if left < 0.37:
        verdict = "true"
    elif left < 0.9:
        verdict = "partly: less"
    else:
        verdict = "false here"
    return verdict, value, {"left": left}


def lora_operations(of: Evidence) -> Judgement:
    share = of.flops("LoRA") / of.flops("full fine-tuning")
    value = (
        f"a LoRA step takes {percent(share)} of full fine-tuning's operations: "
        "the products for the gradients of the base's weights, a third of a step, are not computed."
    )
    return _true_if(abs(share - 2 / 3) < 0.03), value, {"flops": share}


def updates(of: Evidence) -> Judgement:
    full = of.row("full fine-tuning")["flops_per_token"]
    lora = of.row("LoRA")["flops_per_token"]
    updating = full["optimizer"] / full["formula"]
    left = lora["formula"] / full["formula"]
    time = of.ratio("LoRA", "full fine-tuning")
    value = (
        f"updating every weight adds {100 * updating:.2f}% "
        "to the operations of the passes forward and backward. "
        f"A LoRA step updates only its adapter and takes {percent(left)} of the operations "
        f"and {time.format(percent)} of the time: what costs are the passes through the model."
    )
    verdict = "false" if updating < 0.02 and left > 0.5 else "partly"
    return verdict, value, {"updating": updating, "left": left, "time": time}


def last_layers(of: Evidence) -> Judgement:
    flops, time = _over_full(of, "last layer").values()
    value = (
        f"the last layer alone takes {percent(flops)} of full fine-tuning's operations "
        f"and {time.format(percent)} of its time, for the forward pass goes through all of them."
    )
    return judge(time, 0.1, "false", "true"), value, {"flops": flops, "time": time}


def some_layers(of: Evidence) -> Judgement:
    halves = {half: _over_full(of, f"{half} half") for half in ("bottom", "top")}
    bottom, top = (share["flops"] for share in halves.values())
    words = (
        f"{half} half frozen {percent(share['flops'])} of the operations, "
        f"{share['time'].format(percent)} of the time"
        for half, share in halves.items()
    )
    if bottom > 0.95:
        verdict = "false here"
    elif top > 1.1 * bottom:
        verdict = "partly: it matters which"
    else:
        verdict = "true"
    value = (
        f"against full fine-tuning: {'; '.join(words)}. "
        "Below the lowest weight that trains no gradient is needed; above it, every one is."
    )
    return verdict, value, halves


def _over_full(of: Evidence, start: str) -> dict[str, Any]:
    return {
        "flops": of.flops(start) / of.flops("full fine-tuning"),
        "time": of.ratio(start, "full fine-tuning"),
    }


def more_slots(of: Evidence) -> Judgement:
    gain = of.ratio("decode with 8 slots", "decode with 32 slots")
    value = f"32 requests at once in place of 8, four times as many, have {gain.format(times)} the tokens a second."
    return judge(gain, 3.6, "true here", "false: less"), value, {"gain": gain}


def generated_cheaper(of: Evidence) -> Judgement:
    step = of.row("pre-training")
    lone = of.row("decode alone")
    operations = lone["flop_ratio_to_forward"] / step["flop_ratio_to_forward"]
    time = of.ratio("decode alone", "pre-training")
    value = (
        f"decoding alone takes {of.seconds('decode alone')} a token "
        f"and a training step {of.seconds('pre-training')}: {time.format(times)} the time "
        f"for {times(operations)} the operations. "
        "Training multiplies thousands of tokens by a weight at once, a lone stream one."
    )
    return judge(time, 1, "false for a lone request", "true here"), value, {"time": time}


def weights(of: Evidence) -> Judgement:
    names: dict[str, list[str]] = {"changed": [], "partly": [], "identical": []}
    verdict = "true"
    for row in of.rows.values():
        names[row["weights"]].append(row["name"])
        if row["stage"] in ("inference", "decode") and row["weights"] != "identical":
            verdict = "false here, which is a defect"
    words = "; ".join(f"{change}: {', '.join(rows)}" for change, rows in names.items() if rows)
    value = f"by a fingerprint (SHA-256) of each matrix of weights, before and after: {words}."
    return verdict, value, {change: len(rows) for change, rows in names.items()}


def independent(of: Evidence) -> Judgement:
    same = not of.changed_answers
    if same:
        verdict = "true"
        reply = "the same tokens, and the same probability of each, to the last bit."
    else:
        verdict = "false here, which is a defect"
        reply = "its bits differed."
    value = f"one request, alone and beside {SLOTS - 1} others in each slot in turn: {reply}"
    return verdict, value, {"same_bits": same}


def learns(of: Evidence) -> Judgement:
    before, digest = of.before
    after, digest_after = of.after
    same = of.before == of.after

    def nats(bits: str) -> str:
        return f"{float.fromhex(bits):.4f} ({bits})"

    if same:
        verdict = "false"
        rest = f"and the fingerprint of the weights {digest[:12]}, before and after, to the last bit."
    else:
        verdict = "true here, which is a defect"
        rest = f"before and {nats(after)} after, the fingerprints {digest[:12]} and {digest_after[:12]}."
    value = f"{of.generated:,} tokens were generated; the error on a text is {nats(before)} {rest}"
    return verdict, value, {"same": same}


def readings(of: Evidence) -> Judgement:
    learning = of.learning
    over = Ratio(**learning["over"])
    text = dict(zip(learning["readings"], learning["text"]))
    other = dict(zip(learning["readings"], learning["other"]))
    value = (
        f"a small model reads {in_words(learning['letters'])} letters 1, {LEAST} and {MOST} times. "
        f"Its error on each of them falls: {text[1]:.2f}, {text[LEAST]:.2f} and {text[MOST]:.2f}. "
        f"On other pages of the same kind it is {other[1]:.2f}, "
        f"{other[LEAST]:.2f} and {other[MOST]:.2f}, from {LEAST} to {MOST} readings {over.format(times)}."
    )
    return judge(over, 1, "false: it learns it by heart", "true here"), value, {"over": over}


def moved(of: Evidence) -> Judgement:
    distances = of.learning["moved"]
    before = distances["pre-training"]["all weights"]
    once = distances["1"]["all weights"]
    many = distances[str(MOST)]["all weights"]
    value = (
        f"all weights taken as one arrow, pre-training on {in_words(of.learning['pretrained'])} "
        f"letters moved its tip by {percent(before)} of its length; fine-tuning moved it by {percent(once)} "
        f"when its text was read once, and by {percent(many)} when it was read {MOST} times."
    )
    if many < before / 2:
        verdict = "true"
    elif once < before / 2:
        verdict = "partly: if it reads its text once"
    else:
        verdict = "false here"
    return verdict, value, {"pre_training": before, "once": once, "many": many}


def _true_if(holds: bool) -> str:
    return "true" if holds else "partly"


def costs(of: Evidence) -> Judgement:
    def cost(start: str, tokens: float) -> Any:
        return of.usd(of.row(start)["seconds_per_token"] * tokens)

    training_tokens = of.pretraining
    training = cost("pre-training", training_tokens)
    tuning = cost("LoRA", TUNING_TOKENS)
    token = of.ratio("LoRA", "pre-training")
    share = token.scaled(TUNING_TOKENS / training_tokens)
    served_tokens = training / (cost("decode with 8 slots", 1) or 1)
    value = (
        f"pre-training on {in_words(training_tokens)} tokens ({TOKENS_PER_PARAMETER} a parameter) "
        f"{money(training)}, "
        f"LoRA on {in_words(TUNING_TOKENS)} tokens {money(tuning)}, at {money(of.price)} an hour. "
        f"A token of LoRA costs {token.format(percent)} of one of pre-training; the rest is the amount. "
        f"Serving, eight at a time, has cost as much as training after {in_words(served_tokens)} tokens."
    )
    verdict = judge(share, SMALL_PART, "partly: not for so small a model", "true: the data are fewer")
    numbers = {
        "token_share": token,
        "share": share,
        "training_usd": training,
        "fine_tuning_usd": tuning,
        "serving_tokens_that_cost_as_much": served_tokens,
    }
    return verdict, value, numbers


def fortune(of: Evidence) -> Judgement:
    seconds = of.row("pre-training")["seconds_per_token"]
    own = of.usd(seconds * of.pretraining)
    operation = seconds / of.flops("pre-training")
    now = of.usd(operation * GPT2_FLOPS)
    years = operation * GPT2_FLOPS / (365 * 24 * 3600)
    value = (
        f"GPT-2 cost about {money(round(GPT2_USD, -3))} in 2019. "
        f"A model as able took {in_words(GPT2_FLOPS / 1e12)} trillion operations in 2026, "
        f"${H100S_USD:.0f} on eight rented H100s; all by nanochat's leaderboard. "
        f"At what an operation of training costs on this machine they would be {money(now)}, "
        f"and take {years:.3g} years. This model's own pre-training, "
        f"on {TOKENS_PER_PARAMETER} tokens a parameter, is {money(own)}: the price goes with the size."
    )
    if now < SMALL_PART * GPT2_USD:
        verdict = "false now"
    elif now < GPT2_USD:
        verdict = "partly: less than then"
    else:
        verdict = "true here"
    return f"{verdict}, for a model like GPT-2", value, {"then_usd": GPT2_USD, "now_usd": now, "own_usd": own}


def request_timing(reading: Timing, writing: Timing) -> Timing:
    """Returns the seconds of a request in each round, of those of a token that is read and of one
    that is written.
    """
    return Timing(tuple(PROMPT * a + COMPLETION * b for a, b in zip(reading.seconds, writing.seconds)))


def request(of: Evidence) -> Judgement:
    reading = of.row("chunked prefill")
    writing = of.row("decode with 8 slots")
    a_request = request_timing(of.timing("chunked prefill"), of.timing("decode with 8 slots"))
    requests = ratio(of.timing("pre-training").scaled(of.pretraining), a_request)
    price = of.usd(a_request.median)
    value = (
        f"{PROMPT} tokens are read in {si(PROMPT * reading['seconds_per_token'], 's')} "
        f"and {COMPLETION} written in {si(COMPLETION * writing['seconds_per_token'], 's')}, "
        f"eight requests at a time: {money(price)}. "
        f"Pre-training on {in_words(of.pretraining)} tokens costs as much as "
        f"{requests.format(in_words)} such requests."
    )
    return judge(requests, MANY, "true for one", "false here"), value, {"usd": price, "requests": requests}


def caching(of: Evidence) -> Judgement:
    words = (
        f"one more token behind {of.uncached_tokens} takes {si(of.timing('uncached').median, 's')} "
        f"without a cache and {of.seconds('decode alone')} with one"
    )
    return _of_gain(of.ratio("uncached", "decode alone"), words)


def prefix_cache(of: Evidence) -> Judgement:
    return _of_gain(
        of.ratio("chunked prefill", "prefix-cache hit"),
        f"a prompt's token takes {of.seconds('chunked prefill')} to prefill, "
        f"and {of.seconds('prefix-cache hit')} to copy into its slot "
        "where a prompt that began alike was read before",
    )


def batching(of: Evidence) -> Judgement:
    words = (
        f"a token takes {of.seconds('decode alone')} alone, {of.seconds('decode with 8 slots')} among 8 "
        f"and {of.seconds('decode with 32 slots')} among 32"
    )
    return _of_gain(of.ratio("decode alone", "decode with 32 slots"), words)


def _of_gain(gain: Ratio, words: str) -> Judgement:
    return judge_gain(gain), f"{words}: {gain.format(times)}.", {"off_over_on": gain}


def quantisation(of: Evidence) -> Judgement:
    gains: dict[str, Ratio] = {}
    words = []
    for slots in ("8", "32"):
        wide = f"decode with {slots} slots"
        int8 = f"decode with {slots}, int8"
        with contextlib.suppress(KeyError):
            gains[slots] = of.ratio(wide, int8)
            words.append(
                f"among {slots}, a token takes {of.seconds(wide)} with weights "
                f"in {of.bytes_per_weight} bytes and {of.seconds(int8)} in one: {gains[slots].format(times)}"
            )
    if not gains:
        raise KeyError("int8")
    value = f"{'; '.join(words)}. The scores of possible tokens (logits) move by {percent(of.int8_error)} of their spread."
    return judge_gain(gains), value, {"off_over_on": gains}


# in the order of the report
CLAIMS: dict[str, Callable[[Evidence], Judgement]] = {
    "Inference is only half the computation of training.": half,
    "The backward pass costs about twice the forward pass.": half_of_backward,
    "Half is right for one kind of training: a LoRA step.": half_of_lora,
    "The 6 in 6 N D is two forward, two backward and two for the optimizer.": six,
    "Inference is most of the computation of a model's life.": life,
    "LoRA saves two thirds of the memory.": lora_memory,
    "LoRA takes two thirds of a step's operations.": lora_operations,
    "Fine-tuning is expensive because billions of weights are updated.": updates,
    "Fine-tuning only the last layers is nearly free.": last_layers,
    "Doubling the batch doubles the throughput.": more_slots,
    "A token is cheaper to generate than to train on.": generated_cheaper,
    "Fine-tuning is cheaper because only some layers are updated.": some_layers,
    "Weights change in training, partly in fine-tuning, never in inference.": weights,
    "Requests do not affect one another.": independent,
    "The model improves as you use it.": learns,
    "The more often a model reads a text, the better it gets.": readings,
    "Fine-tuning changes the weights only a little.": moved,
    "Fine-tuning costs a small part of what training cost.": costs,
    "Pre-training costs a fortune.": fortune,
    "Answering one request costs next to nothing.": request,
    "The KV cache decides what serving costs.": caching,
    "The prefix cache decides what serving costs.": prefix_cache,
    "Batching decides what serving costs.": batching,
    "Quantisation decides what serving costs.": quantisation,
}
OF_LEARNING = (readings, moved)  # which measure with --out alone


def _plain(numbers: Any) -> Any:
    """Returns the numbers as JSON has them, each ratio as an object of its own."""
    if isinstance(numbers, Ratio):
        return numbers._asdict()
    if isinstance(numbers, dict):
        return {name: _plain(value) for name, value in numbers.items()}
    return numbers

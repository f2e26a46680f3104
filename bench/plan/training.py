"""A training run ahead of time: FLOPs, hours, memory, money and energy, each as an interval, and what binds."""

import math
from typing import Any

from bench.plan.answer import Answer, Interval, around, costs, interval
from bench.plan.formulas import SHARE, Numbers, serving, training, training_memory
from bench.plan.hardware import HERE
from bench.plan.published import clean_runs
from engine.format import format_bytes, in_words

MEMORY = (0.9, 1.1)  # of the formula, with and without recomputation: the bounds that hold published peaks
ADAPTER_BOUND = 0.3  # within which published times of LoRA over those of full fine-tuning lie
SLOTS = 512  # requests at once, at most: what engines take by default


def plan_training(name: str, method: str, m: Any, d: Any, tokens: float, devices: int) -> Answer:
    """Returns the answer for a model and method m on so many devices d."""
    sampling = 0.0
    if method == "rl":  # answers of three quarters of a text
        sampling = devices / serving(m, d, 16, 16, devices, SLOTS, m.context / 4, 3 * m.context / 4, 0)["tokens"]
    result = training(m, d, tokens, devices, sampling)
    spread, origin = d.spread, d.origin
    if method.startswith(("lora", "qlora", "freeze")):
        spread, origin = (
            math.hypot(spread, math.log(1 + ADAPTER_BOUND)),
            f"{origin}; LoRA's time over full tuning's, within 30%",
        )
    middle, share = result["device_hours"], result["efficiency"]
    # No run is faster than the peak.
    hours = interval((middle * max(share, math.exp(-spread)), middle, middle * math.exp(spread)), "hours", origin)
    shares = (share * math.exp(-d.spread), share, min(1, share * math.exp(d.spread)))
    lines = {
        "FLOPs": around(result["flops"], 0, "FLOP", "counted: every product, and causal attention"),
        "share of peak": interval(shares, "share", d.origin),
        "device-hours": hours,
        "wall time": interval((3600 * bound / devices for bound in hours[:3]), "seconds", "device-hours over the devices"),
        "memory a device": Interval(
            MEMORY[0] * result["least"], result["needed"], MEMORY[1] * result["needed"], "bytes",
            f"of {format_bytes(d.memory)}: by formula, from recomputing all activations to as few as fit, and 10%",
        ),
        **costs(hours, d),
    }  # fmt: skip
    notes = ["activations are computed a second time, for they would not fit"] if result["recompute"] else []
    sizes = [run.params for run in clean_runs()]
    if d.name != HERE and not min(sizes) <= m.params <= max(sizes):
        notes.append("no run of a model of this size was published: its share of the peak is extrapolated, and may be far off")
    question = f"{method} of {name} on {in_words(tokens)} tokens, {devices} x {d.name}"
    return Answer(question, lines, _binding(result, m, d, devices), tuple(notes))


def holders(m: Any, d: Any) -> str:
    """Says how many devices d hold the training of m."""
    counts = (2**power for power in range(20))
    enough = next((count for count in counts if training_memory(m, count, 1) <= SHARE * d.memory), 0)
    return f"about {enough} would hold it" if enough else f"no number of them holds a text of {m.context:,} tokens"


def _binding(result: Numbers, m: Any, d: Any, devices: int) -> str:
    """Returns in words what limits the run: memory that is not there, or the slowest of what it does."""
    if result["needed"] > SHARE * d.memory:
        needed = f"{format_bytes(result['needed'])} on each of {devices}, {format_bytes(SHARE * d.memory)} free"
        return f"memory, for it does not fit: {needed}; {holders(m, d)}"
    words = {
        "products": "matrix products: compute", "updates": "the optimizer's update: memory bandwidth",
        "generated": "generating the answers: memory bandwidth",
        "exchanges": "the network, to send weights and gradients with one text a device at a time",
    }  # fmt: skip
    return words[max(words, key=lambda name: result[name])]

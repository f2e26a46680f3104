"""Times one stream of chat at a time through our `Slots`, without speculative decoding and with it, beside llama.cpp.

Each prompt of a set is answered greedily, to its end or for MOST_TOKENS, one after another. Speeds are of decoding, in
each side's own tokens: after a near-tie the two answer differently.
"""

import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from bench.cli import Json, progress
from bench.timing import Ratio, Timing, measure, ratio
from engine.counting.hardware import clock
from engine.inference.request import Request, SamplingParams
from engine.inference.scheduler import DRAFT_ROWS
from engine.inference.slots import Slots

PROMPTS = Path(__file__).with_name("prompts.toml")
ROUNDS, MOST_TOKENS = 6, 48  # of a whole set; of an answer
# The least ratios to llama.cpp's speed, without speculation and with it, by the set of prompts; and to our own without.
REQUIRED: dict[str, tuple[float | None, float]] = {"ordinary": (0.65, 0.8), "repeating": (None, 1.3)}
NEVER_BELOW = 0.97
UNMET = {True: "", False: ": ** not met **", None: ": undecided, within the noise"}  # by whether the ratio is above the least


def read_prompts() -> dict[str, list[str]]:
    """Returns the sets of user messages by name."""
    return tomllib.loads(PROMPTS.read_text("utf-8"))


def our_chats(
    cfg: Any, weights: Any, prompts: list[list[int]], new: int, ends: Collection[int], kv_dtype: Any
) -> dict[str, Callable[[], Json]]:
    """Returns the calls `plain` and `speculative`, each with its seconds of decoding, its tokens, and its decoding steps.

    All have a slot for the stream and one for each draft token: with another number of slots the last bits may differ.
    """
    capacity = max(map(len, prompts)) + new

    def run(slots: Slots) -> Json:
        sampling = SamplingParams(max_tokens=new, temperature=0.0, stop_token_ids=frozenset(ends))
        output, seconds, before = [], 0.0, slots.decode_steps
        for prompt in prompts:
            tokens: list[int] = []
            first = 0.0  # the time of the first token, which counts as prefill
            slots.submit(Request(tuple(prompt), sampling))
            while slots.busy:
                for event in slots.step():
                    first = first or clock()
                    tokens += event.tokens
            seconds += clock() - first
            output.append(tokens)
        return {"decode": seconds, "tokens": output, "steps": slots.decode_steps - before - len(prompts)}

    def call(**options: Any) -> Callable[[], Json]:
        slots = Slots(cfg, weights, slots=1 + DRAFT_ROWS, capacity=capacity, kv_dtype=kv_dtype, **options)
        slots.warm()
        return lambda: run(slots)

    return {"plain": call(speculate=False), "speculative": call()}


def measure_chats(set_name: str, calls: dict[str, Callable[[], Json]], price: float) -> list[Json]:
    """Times the calls in turns on one set of prompts; prints a row for plain and for speculative decoding, and returns them.

    Raises ValueError when speculation changes a token.
    """
    results: dict[str, Json] = {}

    def keep(name: str, call: Callable[[], Json]) -> Callable[[], float]:
        def timed() -> float:
            results[name] = call()
            return results[name]["decode"] / _decoded(results[name])

        return timed

    timings = measure(
        {name: keep(name, call) for name, call in calls.items()}, rounds=ROUNDS, warmups=0, seconds_of=float,
        report=lambda done, total: progress(f"{set_name} prompts: round {done} of {total}"),
    )  # fmt: skip
    kinds = [kind for kind in results if kind != "peer"]
    if any(results[kind]["tokens"] != results["plain"]["tokens"] for kind in kinds):
        raise ValueError("speculative decoding has changed a token")
    return [_row(set_name, kind, timings, results, price) for kind in kinds]


def _decoded(result: Json) -> int:
    """Returns the tokens that a set's seconds of decoding gave: all but the first of each answer."""
    return sum(max(len(tokens) - 1, 0) for tokens in result["tokens"])


def _row(set_name: str, kind: str, timings: dict[str, Timing], results: dict[str, Json], price: float) -> Json:
    speculative = kind != "plain"
    rate, least = 1 / timings[kind].median, REQUIRED[set_name][speculative]
    fields: Json = {
        "name": f"{set_name}_{kind}", "streams": 1, "tokens_per_second": rate, "peer_tokens_per_second": None,
        **Ratio(None).fields(), "must": least, "usd_per_million_tokens": price / 3600 / rate * 1e6,
    }  # fmt: skip
    line = f"{fields['name']:<21} {rate:5.0f} tokens/s"
    if speculative:
        over = ratio(timings["plain"], timings[kind])
        fields |= {"tokens_per_step": _decoded(results[kind]) / results[kind]["steps"]}
        fields |= {"over_plain": over.ratio, "over_plain_must": NEVER_BELOW}
        line += f", {fields['tokens_per_step']:.2f} a step; {held_to(over, NEVER_BELOW)} of plain"
    if "peer" in timings:
        over = ratio(timings["peer"], timings[kind])
        fields |= over.fields() | {"peer_tokens_per_second": 1 / timings["peer"].median}
        line += f"; llama.cpp {fields['peer_tokens_per_second']:4.0f}: {held_to(over, least)}"
    print(line, flush=True)
    return fields


def held_to(over: Ratio, least: float | None) -> str:
    """Returns a ratio in words, and whether it is the least that is required."""
    return f"{over} times" + (f" (at least {least:g}{UNMET[over.exceeds(least)]})" if least else "")

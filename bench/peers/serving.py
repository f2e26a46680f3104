"""Times streams through our `Engine`, as the server runs it, beside the same streams through llama.cpp.

Both read the same GGUF file with all cores, greedily; ours with int8 weights. Each row has the slots that it can use, and is
timed while all its streams are under way; those of one are timed without the kernel in C too. The rows of chat are one stream
on the prompts of prompts.toml, one after another, each answered to its end or for MOST_TOKENS, speculative and not: their
speeds are of decoding, in each side's own tokens, for after a near-tie the two answer differently.
"""

import functools
import tomllib
from collections.abc import Callable, Collection
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.cli import Json, progress
from bench.peers.process import Peer, PeerError, start_peer
from bench.timing import Ratio, Timing, measure, ratio
from engine.counting.hardware import clock
from engine.device import cores
from engine.errors import UserError
from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.request import Request, SamplingParams
from engine.inference.scheduler import DRAFT_ROWS
from engine.model.native.library import native_problem
from engine.model.paths import map_paths
from engine.model.weights.int8 import Int8, quantize, store_transposed
from engine.storage.assets import fetch
from engine.storage.model_loader import load_model, locate
from engine.text.chat_tokenizer import ChatTokenizer


class StreamRow(NamedTuple):
    """A row: tokens of each prompt, and the least ratio to the peer's speed."""

    name: str
    streams: int
    prompt: int
    required_ratio: float | None


StreamResult = Json  # seconds of `prefill` and of `decode`, and the `tokens` of each stream
ROWS = (
    StreamRow("prefill_512", 1, 512, 3.0),
    StreamRow("decode_1", 1, 64, 0.65),
    StreamRow("decode_1_after_512", 1, 512, None),
    StreamRow("decode_8", 8, 64, 1.7),
    StreamRow("decode_32", 32, 64, 2.6),
)
CAPACITY = 1024  # tokens of a stream
MAX_NEW_TOKENS = 800  # the first stream decodes more
PROMPTS = Path(__file__).with_name("prompts.toml")
ROUNDS, MOST_TOKENS = 6, 48  # of a whole set; of an answer
# The least ratios to llama.cpp's speed, without speculation and with it, by the set of prompts; and to our own without.
REQUIRED: dict[str, tuple[float | None, float]] = {"ordinary": (0.65, 0.8), "repeating": (None, 1.3)}
NEVER_BELOW = 0.97
UNMET = {True: "", False: ": ** not met **", None: ": undecided, within the noise"}  # by whether the ratio is above the least
MAKE_VENV = "python3 -m venv peers && peers/bin/pip install llama-cpp-python"


def measure_streams(
    model_name: str, peer_python: Path | None, rows: list[Json], absent: list[dict[str, str]], *, new: int, rounds: int,
    price: float, keys_values: Any,
) -> None:  # fmt: skip
    """Times each row on one .gguf file; prints and adds the rows, or notes in `absent` that there is no peer. Raises UserError
    without such a file. Options are the flags of `bench.peers`."""
    if not 2 <= new <= MAX_NEW_TOKENS:
        raise UserError(f"--new must lie between 2 and {MAX_NEW_TOKENS}, not {new}.")
    location = locate(model_name)
    if location.format != "gguf":
        raise UserError(f"There is no .gguf file at {model_name}; give one, or smollm2-135m-instruct.")
    model = load_model(model_name)
    int8 = quantize(model.params)
    weights = prepare_params(model.cfg, int8)
    transpose = lambda _, leaf: store_transposed(leaf) if isinstance(leaf, Int8) else leaf
    by_xla = prepare_params(model.cfg, map_paths(transpose, int8), whole=False)  # as where there is no kernel
    if problem := native_problem():
        print(f"without the kernel in C: {problem}", flush=True)
    # 32 passages of 512 tokens, evenly spaced in the held-out plays.
    text = fetch("shakespeare")["validation"].read_text(encoding="utf-8")
    starts = (place * (len(text) // 32) for place in range(32))
    passages = [model.tokenizer.encode(text[start : start + 4096]).tolist()[:512] for start in starts]
    print(f"{model.name}, int8 weights, {keys_values} keys and values", flush=True)
    with start_peer(peer_python, "llama_cpp_peer.py", absent, "llama_cpp", MAKE_VENV) as peer:
        for row in ROWS:
            progress(f"compiling {row.name}")
            prompts = [passage[: row.prompt] for passage in passages[: row.streams]]
            tokens = 2 if row.name.startswith("prefill") else new
            calls = {"ours": _our_run(model.cfg, weights, prompts, tokens, keys_values)}
            if row.streams == 1 and tokens == new and not problem:
                calls["by_xla"] = _our_run(model.cfg, by_xla, prompts, tokens, keys_values)
            if peer:
                calls["peer"] = _peer_run(peer, location.path, prompts=prompts, new=tokens)
            rows.append(_measure_row(row, calls, new, rounds, price))
        chat = ChatTokenizer(model.tokenizer)
        ends = {*model.eos_ids, *chat.eot_ids}
        for name, texts in read_prompts().items():
            prompts, most = [chat.prompt([{"role": "user", "content": text}]).tolist() for text in texts], min(new, MOST_TOKENS)
            calls = our_chats(model.cfg, weights, prompts, most, ends, keys_values)
            if peer:
                calls["peer"] = _peer_run(peer, location.path, prompts=prompts, new=most, ends=sorted(ends))
            rows += measure_chats(name, calls, price)
        chat.close()


def _peer_run(peer: Peer, file: Path, **spec: Any) -> Callable[[], StreamResult]:
    """Returns a call of llama.cpp on a file. Raises UserError."""
    try:
        peer.ask(make="llama", spec={"file": str(file), "threads": cores(), **spec})
    except PeerError as error:
        raise UserError(f"llama.cpp: {error}") from None
    return functools.partial(peer.ask, run="llama")


def _our_run(cfg: Any, weights: Any, prompts: list[list[int]], new: int, kv_dtype: Any) -> Callable[[], StreamResult]:
    """Returns a call of `Engine` with a slot for each stream, without draft tokens."""
    engine = Engine(cfg, weights, EngineConfig(len(prompts), CAPACITY, kv_dtype=kv_dtype, speculate=False))
    engine.warm()

    def run() -> StreamResult:
        # The first streams decode while later prompts are prefilled, and go on past `new`: decoding is timed with all
        # streams at work, as the peer's is.
        sampling = SamplingParams(max_tokens=CAPACITY - max(map(len, prompts)), temperature=0.0)
        output: dict[int, list[int]] = {engine.submit(Request(tuple(prompt), sampling)): [] for prompt in prompts}
        count = lambda: sum(map(len, output.values()))

        def step_until(least: int) -> None:
            while min(map(len, output.values())) < least:
                for event in engine.step():
                    output[event.id] += event.tokens
                    if event.finish_reason:
                        raise ValueError(f"a stream ended ({event.finish_reason}) after {len(output[event.id])} tokens")

        begin = clock()
        step_until(1)
        prefilled, early = clock(), count()
        step_until(new)
        decode = (clock() - prefilled) * (new - 1) * len(prompts) / (count() - early)
        for id in output:
            engine.cancel(id)
        return {"prefill": prefilled - begin, "decode": decode, "tokens": [tokens[:new] for tokens in output.values()]}

    return run


def _measure_row(row: StreamRow, calls: dict[str, Callable[[], StreamResult]], new: int, rounds: int, price: float) -> Json:
    """Times the calls in turns, a prefill row their prefill, a decode row their decoding."""
    prefill = row.name.startswith("prefill")
    tokens = {name: call()["tokens"] for name, call in calls.items()}
    timings = measure(
        calls, rounds=rounds, warmups=0, seconds_of=itemgetter("prefill" if prefill else "decode"),
        report=lambda done, total: progress(f"{row.name}: round {done} of {total}"),
    )  # fmt: skip
    count = row.prompt if prefill else (new - 1) * row.streams
    rate = count / timings["ours"].median
    usd, least = price / 3600 / rate * 1e6, row.required_ratio
    fields: Json = {
        "name": row.name, "streams": row.streams, "tokens_per_second": rate, "peer_tokens_per_second": None,
        **Ratio(None).fields(), "must": least, "usd_per_million_tokens": usd,
    }  # fmt: skip
    line = f"{row.name:<18} {rate:7.0f} tokens/s, ${usd:.3f} a million"
    if "peer" in calls:
        # The share of tokens before each stream's first difference: our int8 and their four bits differ at a near-tie.
        pairs = zip(tokens["ours"], tokens["peer"])
        same = sum(next((n for n, (a, b) in enumerate(zip(*pair)) if a != b), len(pair[0])) for pair in pairs)
        fields["same_tokens"] = same / sum(map(len, tokens["ours"]))
        fields["peer_tokens_per_second"] = theirs = count / timings["peer"].median
        over = ratio(timings["peer"], timings["ours"])
        fields |= over.fields()
        line += f"; llama.cpp {theirs:6.0f}: {held_to(over, least)}"
    if "by_xla" in calls:
        over = ratio(timings["by_xla"], timings["ours"])
        fields |= {"native_ratio": over.ratio, "native_same": tokens["by_xla"] == tokens["ours"]}
        line += f"; without the kernel in C {count / timings['by_xla'].median:.0f}: {over} times"
    print(line, flush=True)
    return fields


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

    def run(engine: Engine) -> Json:
        sampling = SamplingParams(max_tokens=new, temperature=0.0, stop_token_ids=frozenset(ends))
        output, seconds, before = [], 0.0, engine.decode_steps
        for prompt in prompts:
            tokens: list[int] = []
            first = 0.0  # the time of the first token, which counts as prefill
            engine.submit(Request(tuple(prompt), sampling))
            while engine.busy:
                for event in engine.step():
                    first = first or clock()
                    tokens += event.tokens
            seconds += clock() - first
            output.append(tokens)
        return {"decode": seconds, "tokens": output, "steps": engine.decode_steps - before - len(prompts)}

    def call(speculate: bool) -> Callable[[], Json]:
        config = EngineConfig(1 + DRAFT_ROWS, capacity, kv_dtype=kv_dtype, speculate=speculate)
        engine = Engine(cfg, weights, config)
        engine.warm()
        return lambda: run(engine)

    return {"plain": call(speculate=False), "speculative": call(speculate=True)}


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

"""Times prefill and decoding of streams through our `Slots` beside the same streams through llama.cpp."""

import functools
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.cli import Json, progress
from bench.peers.process import Peer, PeerError, start_peer
from bench.streams.chat_streams import MOST_TOKENS, held_to, measure_chats, our_chats, read_prompts
from bench.timing import Ratio, measure, ratio
from engine.counting.hardware import clock
from engine.device import cores, device_name
from engine.errors import UserError
from engine.inference.decode import prepare_params
from engine.inference.request import Request, SamplingParams
from engine.inference.slots import Slots
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
MAKE_VENV = "python3 -m venv peers && peers/bin/pip install llama-cpp-python"


def measure_streams(
    model_name: str, peer_python: Path | None, *, new: int, rounds: int, price: float, keys_values: Any
) -> Json:
    """Times each row on one .gguf file, which both sides read; prints the rows and returns them. Raises UserError without one.

    Options are the flags of `bench.inference`.
    """
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
    print(f"{device_name()}, {cores()} cores, {model.name}, int8 weights, {keys_values} keys and values", flush=True)
    absent: list[dict[str, str]] = []
    rows: list[Json] = []
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
    return {
        "device": device_name(), "cores": cores(), "model": model.name, "weights": "int8", "keys_values": keys_values,
        "rounds": rounds, "price_per_hour": price, "rows": rows, "absent": absent,
    }  # fmt: skip


def _peer_run(peer: Peer, file: Path, **spec: Any) -> Callable[[], StreamResult]:
    """Returns a call of llama.cpp on a file. Raises UserError."""
    try:
        peer.ask(make="llama", spec={"file": str(file), "threads": cores(), **spec})
    except PeerError as error:
        raise UserError(f"llama.cpp: {error}") from None
    return functools.partial(peer.ask, run="llama")


def _our_run(cfg: Any, weights: Any, prompts: list[list[int]], new: int, kv_dtype: Any) -> Callable[[], StreamResult]:
    """Returns a call of `Slots` with a slot for each stream, without draft tokens."""
    slots = Slots(cfg, weights, slots=len(prompts), capacity=CAPACITY, kv_dtype=kv_dtype, speculate=False)
    slots.warm()

    def run() -> StreamResult:
        # The first streams decode while later prompts are prefilled, and go on past `new`: decoding is timed with all
        # streams at work, as the peer's is.
        sampling = SamplingParams(max_tokens=CAPACITY - max(map(len, prompts)), temperature=0.0)
        output: dict[int, list[int]] = {slots.submit(Request(tuple(prompt), sampling)): [] for prompt in prompts}
        count = lambda: sum(map(len, output.values()))

        def step_until(least: int) -> None:
            while min(map(len, output.values())) < least:
                for event in slots.step():
                    output[event.id] += event.tokens
                    if event.finish_reason:
                        raise ValueError(f"a stream ended ({event.finish_reason}) after {len(output[event.id])} tokens")

        begin = clock()
        step_until(1)
        prefilled, early = clock(), count()
        step_until(new)
        decode = (clock() - prefilled) * (new - 1) * len(prompts) / (count() - early)
        for id in output:
            slots.cancel(id)
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

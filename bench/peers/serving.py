"""Times streams through our `Engine`, as the server runs it, beside the same streams through llama.cpp.

Both read the same GGUF file, greedily, and multiply its blocks: we with all cores, llama.cpp in the
setting, of flash attention and threads, in which it is fastest. A row has a slot for each stream,
and at least SLOTS, as a server has by default. It is timed while all its streams are under way, or
until the first token. Its bar is that of the processor's family. The rows of chat are one stream on
the prompts of prompts.toml, one after another, each answered to its end or for MOST_TOKENS,
speculative and not: their speeds are of decoding, in each side's own tokens, for after a near-tie
the two answer differently.
"""

import functools
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import Json, bar
from bench.peers.process import Peer, PeerError
from bench.terminal import progress
from bench.timing import Ratio, held_to, measure, ratio
from engine.counting.hardware import clock
from engine.errors import UserError
from engine.inference.config import EngineConfig
from engine.inference.engine import Engine
from engine.inference.request import Request, SamplingParams
from engine.inference.scheduler import DRAFT_ROWS
from engine.model.config import ModelConfig
from engine.model.native.library import native_problem
from engine.model.weights.block_layout import KINDS
from engine.processor import cores
from engine.storage.assets import fetch
from engine.storage.kinds_in_words import describe_kinds
from engine.storage.model_loader import LoadedModel, load_model, locate
from engine.text.chat_tokenizer import ChatTokenizer


class StreamRow(NamedTuple):
    """A row: tokens of each prompt, the least ratio to the peer's speed, and whether `--quick`
    measures it.
    """

    name: str
    streams: int
    prompt: int
    bar: float | None
    quick: bool = True

    @property
    def prefills(self) -> bool:
        """Whether the time is that until the first token."""
        return self.name.startswith(("prefill", "first_token"))


# A run of all streams. It returns seconds of `prefill` and of `decode`, the tokens that were
# `decoded` in those, the `tokens` of each stream, and perhaps the decoding `steps`.
PeerCall = Callable[[], Json]
ONE_STREAM = bar(1.0, 1.1, 1.1)
FIRST_TOKEN = bar(1.0, 1.2, 1.2)
ROWS = (
    StreamRow("prefill_512", 1, 512, bar(2.3, 3.8, 3.0)),
    StreamRow("first_token_10", 1, 10, FIRST_TOKEN, quick=False),
    StreamRow("first_token_40", 1, 40, FIRST_TOKEN),
    StreamRow("first_token_100", 1, 100, FIRST_TOKEN, quick=False),
    StreamRow("decode_1", 1, 64, ONE_STREAM),
    StreamRow("decode_1_after_512", 1, 512, ONE_STREAM),
    StreamRow("decode_1_after_2048", 1, 2048, ONE_STREAM, quick=False),
    StreamRow("decode_1_after_7500", 1, 7500, ONE_STREAM, quick=False),
    StreamRow("decode_8", 8, 64, bar(2.2, 3.0, 3.5)),
    StreamRow("decode_8_after_2048", 8, 2048, bar(1.5, 2.0, 2.0), quick=False),
    StreamRow("decode_32", 32, 64, bar(2.4, 3.2, 5.0)),
)
# the peers, as rows name them
LLAMA = "llama.cpp"
MISTRAL = "mistral.rs"
SLOTS = 8  # of a server, by default
ROOM = 692  # tokens of a stream after its prompt: the longest fills the context
MAX_NEW_TOKENS = 400  # the first stream decodes up to 240 more while the last prompts are read
# by set
PROMPTS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text("utf-8"))
MOST_TOKENS = 48  # of an answer
# The least ratios to llama.cpp's speed, without speculation and with it, by the set of prompts; and
# to our own without.
REQUIRED = {
    "ordinary": (ONE_STREAM, ONE_STREAM),
    "repeating": (None, bar(1.2, 1.5, 1.5)),
}
NEVER_BELOW = 0.97
PASSAGES = 32  # evenly spaced in the held-out plays: the prompts of as many streams


class Sides(NamedTuple):
    """Our model and the peer that reads the same file, None where there is none; and how they are timed."""

    model: LoadedModel
    cfg: ModelConfig  # of our engine
    weights: Any  # as our engine multiplies them
    file: Path
    peer: Peer | None
    peer_name: str
    rounds: int
    has_bars: bool

    def with_peer(self, calls: dict[str, PeerCall], **spec: Any) -> dict[str, PeerCall]:
        """Returns the calls and that of the peer, where there is one."""
        if not self.peer:
            return calls
        return calls | {"peer": _peer_call(self.peer, self.peer_name, file=str(self.file), **spec)}


def choose_rows(names: Collection[str], quick: bool) -> set[str]:
    """Returns the names of the rows to measure: `names`, by default all, or those of `--quick`.

    Raises UserError for a name that no row has.
    """
    unknown = set(names).difference((row.name for row in ROWS), PROMPTS)
    if unknown:
        raise UserError(
            f"Serving has no row {min(unknown)}: take {', '.join([*(row.name for row in ROWS), *PROMPTS])}."
        )
    if names:
        return set(names)
    return {row.name for row in ROWS if row.quick or not quick} | PROMPTS.keys()


def check_new(new: int) -> None:
    """Raises UserError for a number of tokens that no row can generate."""
    if not 2 <= new <= MAX_NEW_TOKENS:
        raise UserError(f"--new must lie between 2 and {MAX_NEW_TOKENS}, not {new}.")


def measure_streams(
    model_name: str,
    peer: Peer | None,
    *,
    new: int,
    rounds: int,
    names: Collection[str],
    about: Json,
    peer_name: str = LLAMA,
    has_bars: bool = True,
) -> list[Json]:
    """Times the rows of `names` on one .gguf file; prints and returns them, with `about` in each.

    `new`, `rounds`: the flags of `bench.peers`. Raises UserError for what is no such file.
    """
    location = locate(model_name)
    if location.format != "gguf":
        raise UserError(f"There is no .gguf file at {model_name}; give one, or smollm2-135m-instruct.")
    problem = native_problem()
    model = load_model(model_name, keep_kinds=() if problem else KINDS)
    config = EngineConfig(weights="file")
    cfg = config.model_config(model.cfg)
    weights = config.prepare_params(cfg, model.params)
    if problem:
        print(f"without the kernels in C, and so in int8: {problem}", flush=True)
    text = fetch("shakespeare")["validation"].read_text(encoding="utf-8")
    kinds = describe_kinds(model.kinds, weights)
    print(f"{model.name}: {kinds}", flush=True)
    # that of most matrices: embedding and head often have more bits
    ((kind, _),) = Counter(model.kinds.values()).most_common(1)
    facts = {"model": model.name, "file": location.path.name, "format": kind, "kinds": kinds}
    facts |= {"peer": peer_name, **about}
    sides = Sides(
        model=model,
        cfg=cfg,
        weights=weights,
        file=location.path,
        peer=peer,
        peer_name=peer_name,
        rounds=rounds,
        has_bars=has_bars,
    )
    rows = []
    for row in ROWS:
        if row.name in names:
            progress(f"compiling {row.name}")
            rows += _measure_row(sides, row, text, new)
    chat = ChatTokenizer(model.tokenizer)
    for name in PROMPTS:
        if name in names:
            rows += _measure_chat(sides, name, chat, min(new, MOST_TOKENS))
    chat.close()
    return [facts | row for row in rows]


def _measure_row(sides: Sides, row: StreamRow, text: str, new: int) -> list[Json]:
    """Times a row on passages of a text, of which `new` tokens are decoded, or two where the row is of
    prefill.
    """
    tokenizer = sides.model.tokenizer
    prompts = []
    for number in range(row.streams):
        start = number * (len(text) // PASSAGES)
        # Eight letters a token are enough.
        passage = tokenizer.encode(text[start : start + 8 * row.prompt])
        prompts.append(passage.tolist()[: row.prompt])
    if row.prefills:
        tokens = 2
        phase = "prefill"
        prefilled = row.prompt
    else:
        tokens = new
        phase = "decode"
        prefilled = 0
    calls = sides.with_peer(
        {"ours": stream_call(sides.cfg, sides.weights, prompts, tokens)},
        prompts=prompts,
        text=tokenizer.decode(prompts[0]),
        new=tokens,
        phase=phase,
    )
    return measure_calls(
        row.name,
        calls,
        {"ours": row.bar if sides.has_bars else None},
        sides.rounds,
        peer_name=sides.peer_name,
        streams=row.streams,
        prefilled=prefilled,
    )


def _measure_chat(sides: Sides, name: str, chat: ChatTokenizer, most: int) -> list[Json]:
    """Times the answers to a set of PROMPTS, of `most` tokens at most, with and without speculation."""
    prompts = [chat.prompt([{"role": "user", "content": text}]).tolist() for text in PROMPTS[name]]
    ends = {*sides.model.eos_ids, *chat.eot_ids}
    calls = sides.with_peer(
        chat_calls(sides.cfg, sides.weights, prompts, most, ends),
        prompts=prompts,
        new=most,
        ends=sorted(ends),
        phase="decode",
    )
    required: dict[str, float | None] = {"plain": None, "speculative": None}
    if sides.has_bars:
        plain, speculative = REQUIRED[name]
        required = {"plain": plain, "speculative": speculative}
    return measure_calls(name, calls, required, sides.rounds, peer_name=sides.peer_name)


def _peer_call(peer: Peer, name: str, **spec: Any) -> PeerCall:
    """Returns a call of a peer, which is prepared for it. Raises UserError."""
    try:
        peer.ask(make="streams", spec={"threads": cores(), **spec})
    except PeerError as error:
        raise UserError(f"{name}: {error}") from None

    def call() -> Json:
        result = peer.ask(run="streams")
        if "tokens" in result:
            decoded = sum(max(len(tokens) - 1, 0) for tokens in result["tokens"])
        else:
            decoded = spec["new"] - 1
        return result | {"decoded": decoded}

    return call


def stream_call(cfg: Any, weights: Any, prompts: list[list[int]], new: int, room: int = ROOM) -> PeerCall:
    """Returns a call of `Engine` with a slot for each stream, and at least SLOTS, without draft
    tokens. `room`: tokens of a stream after its prompt.
    """
    engine = Engine(
        cfg, weights, EngineConfig(max(SLOTS, len(prompts)), len(prompts[0]) + room, speculate=False)
    )
    engine.warm()

    def call() -> Json:
        # The first streams decode while later prompts are prefilled, and go on past `new`: decoding
        # is timed with all streams at work, as the peer's is.
        sampling = SamplingParams(max_tokens=room, temperature=0.0)
        output: dict[int, list[int]] = {
            engine.submit(Request(tuple(prompt), sampling)): [] for prompt in prompts
        }

        def count() -> int:
            return sum(map(len, output.values()))

        def step_until(least: int) -> None:
            while min(map(len, output.values())) < least:
                for event in engine.step():
                    output[event.id] += event.tokens
                    if event.finish_reason:
                        raise ValueError(
                            f"a stream ended ({event.finish_reason}) after {len(output[event.id])} tokens"
                        )

        begin = clock()
        step_until(1)
        prefilled = clock()
        early = count()
        step_until(new)
        seconds = clock() - prefilled
        for id in output:
            engine.cancel(id)
        return {
            "prefill": prefilled - begin,
            "decode": seconds,
            "decoded": count() - early,
            "tokens": [tokens[:new] for tokens in output.values()],
        }

    return call


def chat_calls(
    cfg: Any, weights: Any, prompts: list[list[int]], new: int, ends: Collection[int]
) -> dict[str, PeerCall]:
    """Returns the calls `plain` and `speculative`, which answer one prompt after another.

    Both have a slot for the stream and one for each draft token: with another number of slots the
    last bits may differ.
    """
    capacity = max(map(len, prompts)) + new

    def call(engine: Engine) -> Json:
        sampling = SamplingParams(max_tokens=new, temperature=0.0, stop_token_ids=frozenset(ends))
        output = []
        seconds = 0.0
        before = engine.steps_decoded
        for prompt in prompts:
            tokens: list[int] = []
            first = 0.0  # when the first token came, which counts as prefill; 0: it has not
            engine.submit(Request(tuple(prompt), sampling))
            while engine.busy:
                for event in engine.step():
                    first = first or clock()
                    tokens += event.tokens
            seconds += clock() - first
            output.append(tokens)
        decoded = sum(max(len(tokens) - 1, 0) for tokens in output)
        return {
            "decode": seconds,
            "decoded": decoded,
            "tokens": output,
            "steps": engine.steps_decoded - before - len(prompts),
        }

    calls: dict[str, PeerCall] = {}
    for name in ("plain", "speculative"):
        engine = Engine(cfg, weights, EngineConfig(1 + DRAFT_ROWS, capacity, speculate=name != "plain"))
        engine.warm()
        calls[name] = functools.partial(call, engine)
    return calls


def measure_calls(
    name: str,
    calls: Mapping[str, PeerCall],
    required: Mapping[str, float | None],
    rounds: int,
    *,
    peer_name: str = LLAMA,
    streams: int = 1,
    prefilled: int = 0,
) -> list[Json]:
    """Times the calls in turns, by the seconds of a decoded token, or of one of `prefilled`; prints
    and returns a row for each of `required`, which are ours: their least ratio to the speed of the
    calls `peer` and `plain`.

    Raises ValueError when speculation changes a token.
    """
    results: dict[str, Json] = {}

    def keep(way: str) -> Json:
        results[way] = calls[way]()
        return results[way]

    def seconds_of(result: Json) -> float:
        if prefilled:
            return result["prefill"] / prefilled
        return result["decode"] / result["decoded"]

    def over(other: str, way: str) -> Ratio:
        if other not in timings:
            return Ratio(None)
        return ratio(timings[other], timings[way])

    timings = measure(
        {way: functools.partial(keep, way) for way in calls},
        rounds=rounds,
        seconds_of=seconds_of,
        report=lambda done, total: progress(f"{name}: round {done} of {total}"),
    )
    if "speculative" in results and results["speculative"]["tokens"] != results["plain"]["tokens"]:
        raise ValueError("speculative decoding has changed a token")
    peer_settings = []
    if "setting" in results.get("peer", {}):
        peer_settings.append(results["peer"]["setting"])
    peer_speed = None
    if "peer" in timings:
        peer_speed = 1 / timings["peer"].median
    rows = []
    for way, least in required.items():
        speed = 1 / timings[way].median
        over_peer = over("peer", way)
        row: Json = {
            "name": name if way == "ours" else f"{name}_{way}",
            "streams": streams,
            "tokens_per_second": speed,
            "peer_tokens_per_second": peer_speed,
            **over_peer._asdict(),
            "peer_settings": peer_settings,
            "bar": least,
            "met": over_peer.exceeds(least) if least else None,
        }
        line = f"{row['name']:<21} {speed:7.0f} tokens/s"
        if way == "speculative":
            per_step = results[way]["decoded"] / results[way]["steps"]
            over_plain = over("plain", way)
            row["tokens_per_step"] = per_step
            met = over_plain.exceeds(NEVER_BELOW)
            row["over_plain"] = over_plain._asdict() | {"bar": NEVER_BELOW, "met": met}
            line += f", {per_step:.2f} a step; {held_to(over_plain, NEVER_BELOW)} of plain"
        if peer_speed is not None:
            line += f"; {peer_name} {peer_speed:.0f}: {held_to(over_peer, least)}"
        print(line, flush=True)
        rows.append(row)
    return rows

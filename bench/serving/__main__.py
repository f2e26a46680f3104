"""Measures the server: tokens a second, against its own engine, latency under load, what each part brings.

    python -m bench.serving            about four minutes on two cores
    python -m bench.serving --quick    fewer rounds, about ninety seconds

Starts `python -m stages.serve` on a port of its own and drives it over loopback, from this process, on the same cores. The
server and its engine without a server run in turns. The last line of stdout is JSON. What the server promises is tested by
`pytest tests/promises -m promises -n 0`.
"""

import asyncio
import dataclasses
import signal
import sys
from typing import Any

from bench.cli import run_bench


@dataclasses.dataclass(frozen=True)
class Flags:
    """The model, how it is served, and the price of the machine."""

    model: str = "smollm2-135m-instruct"
    """A run folder, a Hugging Face folder, a .gguf file or smollm2-135m-instruct."""
    slots: int = 8
    """Requests the server answers at the same time."""
    capacity: int | None = None
    """Tokens of prompt and completion together that a request may have; by default what the server chooses."""
    weights: str = "int8"
    """How its matrices are stored: int8, bfloat16 or float32."""
    price: float = 0.10
    """Dollars an hour of this machine; the default is about what two shared cores are let for."""
    quick: bool = False
    """Fewer rounds and repetitions; figures are as true but know less of rare cases."""


READY_SECONDS = 8.0  # in which a server that has been started before is to be ready
SHARE, GOAL = 0.85, 0.95  # of its engine's own throughput
LOADS = (0.5, 0.8)


def measure(flags: Flags) -> dict[str, Any]:
    """Measures everything and prints the tables; returns the document. Raises UserError."""
    from bench.serving.print import print_tables

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however this ends, its servers end too
    serve = ["--slots", str(flags.slots), "--weights", flags.weights]
    serve += ["--capacity", str(flags.capacity)] if flags.capacity else []
    document = asyncio.run(_measure(flags.model, serve, flags.weights, flags.slots, flags.price, flags.quick))
    print_tables(document)
    return document


async def _measure(model: str, serve: list[str], weights: str, slots: int, price: float, quick: bool) -> dict[str, Any]:
    """The document. `serve`: the flags the server is started with; `price`: dollars an hour."""
    from bench.serving.measure import (
        compare_with_engine,
        latency_under_load,
        saturated_throughput,
        throughput,
        usd_per_million_tokens,
    )
    from bench.serving.server import Server
    from engine.device import device_name

    rounds = 3 if quick else 7
    _note(f"starting stages.serve with {model} ...")
    async with Server(model, serve) as server:
        first = server.ready_seconds
    _note(f"  ready after {first:.1f} s; once more, with what was compiled")
    async with Server(model, serve) as server:
        entry, ready = await server.model(), server.ready_seconds
        document: dict[str, Any] = {
            "model": entry["id"], "device": device_name(), "weights": weights, "slots": slots,
            "capacity": entry["max_model_len"], "quick": quick, "price_per_hour": price, "first_ready_seconds": first,
            "ready_seconds": ready, "ready_bar": READY_SECONDS, "ready_met": ready < READY_SECONDS, "throughput": [],
        }  # fmt: skip
        _note(f"  ready after {ready:.1f} s; throughput of one stream and of more")
        for streams in sorted({1, 8, slots, 2 * slots}):
            rate = await throughput(server, streams, max(streams, 2) * (1 if quick else 3), streams)
            usd = usd_per_million_tokens(rate, price)
            document["throughput"].append({"streams": streams, "tokens_per_second": rate, "usd_per_million_tokens": usd})
        _note(f"the server beside its engine without a server, {rounds} rounds in turns")
        row = await compare_with_engine(server, model, weights, slots, entry["max_model_len"], rounds)
        document["rows"] = [row | {"bar": SHARE, "goal": GOAL, "met": row["ratio"] >= SHARE}]
        _note("saturated with a mix of requests, and latency at shares of that load")
        requests, tokens = await saturated_throughput(server, slots, slots * (4 if quick else 8))
        document["saturated"] = {"requests_per_second": requests, "tokens_per_second": tokens}
        document["load"] = [await latency_under_load(server, load, requests, 12.0 if quick else 40.0) for load in LOADS]
        document["resident_bytes"] = server.resident_bytes()
        document["parts"] = await _parts(server, model, serve, slots, rounds)
    return document


async def _parts(server: Any, model: str, serve: list[str], slots: int, rounds: int) -> list[dict[str, Any]]:
    """What batching brings, and what each part that a flag switches off does, in turns with a server without it."""
    from bench.serving.measure import SHARED_TOKENS, batching_gain, compare, prefix_ttft, repetitive_throughput, throughput
    from bench.serving.server import Server

    all_slots = lambda server: throughput(server, slots, slots, 30)
    # (part, flags that switch it off, figure, how it is measured)
    parts = (
        ("prefix cache", ["--prefix-cache", "0"], f"first token behind {SHARED_TOKENS} shared tokens, s", prefix_ttft),
        ("speculative decoding", ["--no-guesses"], "one stream that repeats itself, tokens/s", repetitive_throughput),
        ("int8 weights", ["--weights", "bfloat16"], "all slots, tokens/s", all_slots),
    )
    on, off, gain = await batching_gain(server, slots, rounds)
    rows = [{"part": "batching", "measured": f"{slots} streams at once, tokens/s", "on": on, "off": off, "gain": gain}]
    for part, flags, figure, way in parts:
        _note(f"with and without {part}")
        async with Server(model, [*serve, *flags]) as other:
            on, off, gain = await compare(way, server, other, rounds)
        gain = 1 / gain if way is prefix_ttft else gain  # of seconds fewer are better
        rows.append({"part": part, "measured": figure, "on": on, "off": off, "gain": gain})
    return rows


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(args: list[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    return run_bench("bench.serving", __doc__, Flags, measure, args)


if __name__ == "__main__":
    sys.exit(main())

"""The server: tokens a second, against its own engine, waits under load, what each part brings; its promises, one by one.

    python -m bench.serving                            about four minutes on two cores
    python -m bench.serving --quick                    fewer rounds, about ninety seconds
    python -m bench.serving --promises                 each promise tried: wanted and measured; half an hour, or --quick
    python -m bench.serving --promises --only S4,S5    some of them

Starts `python -m stages.serve` on a port of its own and drives it over loopback, from this process, on the same cores. The
server and its engine without a server run in turns. The last line of stdout is JSON.
"""

import asyncio
import dataclasses
import signal
import statistics
import sys
from typing import Any

from bench.cli import run
from engine.device import device_name


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is served, at what price, and whether it is its speed or its promises that are looked at."""

    model: str = "smollm2-135m-instruct"
    """A run folder, a Hugging Face folder, a .gguf file or smollm2-135m-instruct."""
    promises: bool = False
    """Try the promises instead of measuring speed."""
    only: str = ""
    """Names of promises, such as S4,S5; by default all."""
    slots: int = 8
    """Requests the server answers at the same time."""
    capacity: int | None = None
    """Tokens of prompt and completion together that a request may have; by default what the server chooses."""
    weights: str = "int8"
    """What its matrices are kept as: int8, bfloat16 or float32."""
    price: float = 0.10
    """Dollars an hour of this machine; the default is about what two shared cores are let for."""
    quick: bool = False
    """Fewer rounds and repetitions; figures are as true but know less of rare cases."""


WARM = 8.0  # seconds in which a server that has been started before is to be ready
SHARE, GOAL = 0.85, 0.95  # of its engine's own throughput
LOADS = (0.5, 0.8)
# What is switched off: (what it is, flags that do it, what is measured, and whether more of it is better).
PARTS = (
    ("prefix cache", ("--prefix-cache", "0"), "first token behind 512 shared tokens, s", False),
    ("guesses", ("--no-guesses",), "one stream that repeats itself, tokens/s", True),
    ("int8 weights", ("--weights", "bfloat16"), "all slots, tokens/s", True),
)


def measured(flags: Flags) -> dict[str, Any]:
    """The document: rows of speed, or lines of promises. Raises UserError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however this ends, its servers end too
    return asyncio.run(_promises(flags) if flags.promises else _speed(flags))


async def _promises(flags: Flags) -> dict[str, Any]:
    from bench.promises import Trial, chosen, kept, show
    from bench.serving.server import Server

    wanted = chosen(flags.only)
    _say(f"starting stages.serve with {flags.model} ...")
    async with Server(flags.model, _set_up(flags)) as server:
        about = await _about(server)
        lines = await kept(Trial(flags.model, server, flags.quick, flags.slots, about["max_model_len"], _set_up(flags)), wanted)
    show(lines)
    count = sum(line.outcome.kept for line in lines)
    few = " With --quick, so over few repetitions." if flags.quick else ""
    print(f"{count} of {len(lines)} promises kept.{few}")
    return {
        "model": about["id"], "device": device_name(), "weights": flags.weights, "slots": flags.slots, "quick": flags.quick,
        "kept": count, "of": len(lines), "promises": [line.as_json() for line in lines],
    }  # fmt: skip


async def _speed(flags: Flags) -> dict[str, Any]:
    from bench.serving import measure as rows
    from bench.serving.server import Server, resident

    _say(f"starting stages.serve with {flags.model} ...")
    async with Server(flags.model, _set_up(flags)) as server:
        first = server.ready
    _say(f"  ready after {first:.1f} s; once more, with what was compiled")
    async with Server(flags.model, _set_up(flags)) as server:
        about, slots = await _about(server), flags.slots
        at = rows.Settings(
            flags.model, slots, about["max_model_len"], flags.weights, 3 if flags.quick else 7, 12.0 if flags.quick else 40.0
        )
        document: dict[str, Any] = {
            "model": about["id"], "device": device_name(), "weights": flags.weights, "slots": slots, "capacity": at.capacity,
            "quick": flags.quick, "price_per_hour": flags.price, "first_ready_seconds": first, "ready_seconds": server.ready,
            "ready_bar": WARM, "ready_met": server.ready < WARM,
        }  # fmt: skip
        _say(f"  ready after {server.ready:.1f} s; throughput of one stream and of more")
        document["throughput"] = []
        for streams in sorted({1, 8, slots, 2 * slots}):
            found = await rows.throughput(server, streams, max(streams, 2) * (1 if flags.quick else 3), streams)
            price = rows.price_of_a_million(found, flags.price)
            document["throughput"].append({"streams": streams, "tokens_per_second": found, "usd_per_million_tokens": price})
        _say(f"the server beside its engine without a server, {at.rounds} rounds in turns")
        compared = await rows.against_offline(server, at)
        document["rows"] = [compared | {"bar": SHARE, "goal": GOAL, "met": compared["ratio"] >= SHARE}]
        _say("what it can do with a mix of requests, and waits at shares of that")
        rate, tokens = await rows.capacity_of(server, slots, slots * (4 if flags.quick else 8))
        document["capacity"] = {"requests_per_second": rate, "tokens_per_second": tokens}
        document["load"] = [await rows.under_load(server, share, rate, at.seconds) for share in LOADS]
        document["resident_bytes"] = resident(server.process)
        document["parts"] = await _parts(server, flags, at)
    _show(document)
    return document


def _set_up(flags: Flags) -> tuple[str, ...]:
    """What the server is started with."""
    room = ("--capacity", str(flags.capacity)) if flags.capacity else ()
    return "--slots", str(flags.slots), "--weights", flags.weights, *room


async def _about(server: Any) -> dict[str, Any]:
    """What the server says of its model."""
    return (await server.client.get("/v1/models")).json()["data"][0]


async def _parts(server: Any, flags: Flags, at: Any) -> list[dict[str, Any]]:
    from bench.serving import measure as rows
    from bench.serving.server import Server

    all_slots = lambda served, rounds: _several(rows.throughput, served, at.slots, at.slots, rounds)
    ways = (rows.first_token_behind, rows.repetitive, all_slots)
    one, many = [], []
    for turn in range(at.rounds):
        one.append(await rows.throughput(server, 1, 1, 50 + turn))
        many.append(await rows.throughput(server, at.slots, at.slots, 70 + turn))
    gain = statistics.median(b / a for a, b in zip(one, many))
    found = [_part("batching", f"{at.slots} streams at once, tokens/s", statistics.median(many), statistics.median(one), gain)]
    for (name, off, what, more), way in zip(PARTS, ways):
        _say(f"with and without {name}")
        async with Server(flags.model, [*_set_up(flags), *off]) as other:
            with_, without, share = await rows.on_and_off(server, other, way, at.rounds)
        found.append(_part(name, what, with_, without, share if more else 1 / share))
    return found


def _part(name: str, what: str, on: float, off: float, gain: float) -> dict[str, Any]:
    return {"part": name, "measured": what, "on": on, "off": off, "gain": gain}


async def _several(way: Any, server: Any, streams: int, count: int, rounds: int) -> list[float]:
    return [await way(server, streams, count, 30 + turn) for turn in range(rounds)]


def _show(found: dict[str, Any]) -> None:
    """Prints the tables."""
    from rich import box
    from rich.table import Table

    from bench.table.print import console
    from engine.format import money, si

    out = console()

    def table(title: str, heads: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
        made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, title_style="bold")
        for place, head in enumerate(heads):
            made.add_column(head, justify="right" if place else "left", no_wrap=True)
        for line in lines:
            made.add_row(*line)
        out.print(made)

    ready = "" if found["ready_met"] else "   ** not met **"
    print(f"{found['model']}, {found['weights']} weights, {found['slots']} slots, on {found['device']}")
    print(f"ready after {found['ready_seconds']:.1f} s, at most {WARM:g}{ready}; the first time after "
          f"{found['first_ready_seconds']:.1f} s; {si(found['resident_bytes'], 'B')} of memory\n")  # fmt: skip
    table("Throughput, every stream always asking", ("streams", "tokens/s", "$ a million"), [
        (str(row["streams"]), f"{row['tokens_per_second']:.0f}", money(row["usd_per_million_tokens"]))
        for row in found["throughput"]
    ])  # fmt: skip
    table("The server against its own engine", ("", "server, tokens/s", "engine, tokens/s", "share", "at least"), [
        (row["name"], f"{row['tokens_per_second']:.0f}", f"{row['peer_tokens_per_second']:.0f}",
         f"{row['ratio']:.2f} ± {row['spread']:.2f}", f"{SHARE} {'' if row['met'] else '** not met **'}")
        for row in found["rows"]
    ])  # fmt: skip
    capacity = found["capacity"]
    title = f"Waits under Poisson arrivals; all it can do is {capacity['requests_per_second']:.1f} requests/s of the mix"
    heads = ("load", "answered", "tokens/s", "TTFT p50", "p99", "a token p50", "p99")
    table(title, heads, [
        (f"{row['load']:.0%}", f"{row['answered']} of {row['requests']}", f"{row['tokens_per_second']:.0f}",
         *(si(row[name], "s") for name in ("ttft_p50", "ttft_p99", "token_p50", "token_p99")))
        for row in found["load"]
    ])  # fmt: skip
    table("What each part brings", ("", "measured", "on", "off", "gain"), [
        (row["part"], row["measured"], f"{row['on']:.3g}", f"{row['off']:.3g}", f"{row['gain']:.2f}x") for row in found["parts"]
    ])  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(args: list[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    return run("bench.serving", __doc__, Flags, measured, args)


if __name__ == "__main__":
    sys.exit(main())

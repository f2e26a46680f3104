"""Measures the server: when it is ready, throughput, also against its own engine, and latency under load.

    python -m bench.serving          about three minutes on two cores
    python -m bench.serving --quick  fewer rounds, about a minute

Starts `python -m stages.serve` and drives it over loopback, from this process, on the same cores.
The server and its engine without a server run in turns. The server's promises are tested by `pytest
tests/promises -m promises -n 0`.
"""

import asyncio
import dataclasses
import signal
import sys

from bench.cli import BARS_HOLD, run_bench
from bench.machine import Json
from bench.terminal import print_table, progress
from engine.device import device_name, start_jax
from engine.format import percent, si

READY_SECONDS = 4.0  # to be ready in, programs cached


@dataclasses.dataclass(frozen=True)
class ServingFlags:
    """Which model is served, in how many slots, and with which weights."""

    model: str = "smollm2-135m-instruct"
    """A run or step folder, a Hugging Face folder, a .gguf file, ORG/NAME on the hub, or a named model."""
    slots: int = 8
    """Requests the server answers at the same time."""
    weights: str = "int8"
    """How its matrices are stored, as of stages.serve: file, q4, int8, bfloat16 or float32."""
    quick: bool = False
    """Fewer rounds and repetitions: rare cases show less."""


def measure_serving(flags: ServingFlags) -> Json:
    """Measures the server, prints the tables, and returns the document, in which a bar may be
    unmet.
    """
    # however this ends, its servers end too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server_flags = ["--slots", str(flags.slots), "--weights", flags.weights]
    document = asyncio.run(_measure(flags, server_flags))
    print_tables(document)
    return document


async def _measure(flags: ServingFlags, server_flags: list[str]) -> Json:
    start_jax(one_arena=False)
    from bench.serving import measure  # imports JAX: --help needs none
    from bench.serving.server import Server

    model = flags.model
    slots = flags.slots
    quick = flags.quick
    if quick:
        rounds = 6
    else:
        rounds = 9
    progress(f"starting stages.serve with {model} ...")
    async with Server(model, server_flags) as server:
        first = server.ready_seconds
    progress(f"  ready after {first:.1f} s; once more, with what was compiled")
    async with Server(model, server_flags) as server:
        entry = await server.model()
        ready = server.ready_seconds
        document: Json = {
            "bars_hold": BARS_HOLD,
            "model": entry["id"],
            "device": device_name(),
            "weights": flags.weights,
            "slots": slots,
            "capacity": entry["max_model_len"],
            "quick": quick,
            "first_ready_seconds": first,
            "ready_seconds": ready,
            "ready_bar": READY_SECONDS,
            "ready_met": ready < READY_SECONDS,
        }
        progress(f"  ready after {ready:.1f} s; beside its engine without a server, {rounds} rounds in turns")
        engine, tokenizer = await asyncio.to_thread(
            measure.make_engine, model, flags.weights, slots, entry["max_model_len"]
        )
        row = await measure.compare_with_engine(server, engine, rounds)
        progress(
            "  streams that keep to a JSON schema, or have an adapter each, "
            "beside streams without; idle slots"
        )
        grammar_rows = await asyncio.to_thread(measure.compare_with_grammars, engine, tokenizer, rounds)
        document["rows"] = [row, *grammar_rows]
        for compare in (measure.compare_with_adapters, measure.compare_with_one_slot):
            document["rows"].append(await asyncio.to_thread(compare, engine, rounds))
        document["scored"] = await measure.scored_per_second(server, rounds)
        progress("saturated with a mix of requests, and latency at shares of that load")
        if quick:
            requests = slots * 4
            seconds = 12.0
        else:
            requests = slots * 8
            seconds = 40.0
        peak, tokens = await measure.saturated_throughput(server, slots, requests)
        document["saturated"] = {"requests_per_second": peak, "tokens_per_second": tokens}
        document["under_load"] = [
            await measure.latency_under_load(server, load, peak, seconds) for load in (0.5, 0.8)
        ]
        document["resident_bytes"] = server.resident_bytes()
    return document


def print_tables(document: Json) -> None:
    """Prints the document as tables, and says which bars are not met."""
    from bench.timing import UNMET, Ratio  # imports JAX

    print(BARS_HOLD)
    print(
        f"{document['model']}, {document['weights']} weights, "
        f"{document['slots']} slots, on {document['device']}"
    )
    print(
        f"ready after {document['ready_seconds']:.1f} s, at most "
        f"{document['ready_bar']:g}{UNMET[document['ready_met']]}; "
        f"the first time after {document['first_ready_seconds']:.1f} s; "
        f"{si(document['resident_bytes'], 'B')} of memory\n"
    )
    print_table(
        "tokens/s, interleaved",
        ("", "tokens/s", "without", "ratio, 95% interval", "at least"),
        [(*speeds(row), f"{row['bar']:g}{UNMET[row['met']]}") for row in document["rows"]],
    )
    row = document["scored"]
    scored = Ratio.of(row).format("{:.0f}".format)
    print(f"/v1/score: {scored} candidates a second, at least {row['bar']:g}{UNMET[row['met']]}\n")
    saturated = document["saturated"]
    print_table(
        "Latency in an open loop (Poisson arrivals); saturated at "
        f"{saturated['requests_per_second']:.1f} requests/s of the mix, "
        f"{saturated['tokens_per_second']:.0f} tokens/s",
        ("load", "tokens/s", "TTFT p50", "inter-token latency p50", "time per output token p50", "answered"),
        [(*latencies(row), f"{row['answered']} of {row['requests']}") for row in document["under_load"]],
    )


def speeds(row: Json) -> tuple[str, ...]:
    """Returns the cells of one of `rows`: its name, tokens a second with and without, and their
    ratio.
    """
    from bench.timing import Ratio

    speed = f"{row['tokens_per_second']:,.0f}"
    speed_without = f"{row['peer_tokens_per_second']:,.0f}"
    return row["name"], speed, speed_without, str(Ratio.of(row))


def latencies(row: Json) -> tuple[str, ...]:
    """Returns the cells of a row of `under_load`: the load, tokens a second, and each latency with
    its tail.
    """
    seconds = [_seconds_with_tail(row[name]) for name in ("ttft", "inter_token", "per_token")]
    return percent(row["load"]), f"{row['tokens_per_second']:,.0f}", *seconds


def _seconds_with_tail(latency: Json) -> str:
    """Returns the median in words, and the tail where it is another percentile than that."""
    text = si(latency["p50"], "s")
    if latency["tail_percentile"] > 50:
        text += f", p{latency['tail_percentile']} {si(latency['tail'], 's')}"
    return text


if __name__ == "__main__":
    sys.exit(run_bench("bench.serving", __doc__, ServingFlags, measure_serving))

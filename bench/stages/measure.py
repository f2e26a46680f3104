"""Measures the stage table of `python -m bench`: compiles every row of one model, times them interleaved."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.models import find_model, next_token_batch, tokens_for
from bench.stages.checks import logits_error, model_state, serve_beside_others
from bench.stages.claims import COMPLETION, PROMPT, Evidence, claims, request_timing
from bench.stages.learning import measure_learning
from bench.stages.memory import memory_over_time
from bench.stages.residuals import block_residuals
from bench.stages.rows import (
    ADAPTER,
    Row,
    by_hand_rows,
    decode_row,
    evaluation_row,
    prefill_row,
    served_rows,
    training_kinds,
    training_row,
    uncached_decode,
)
from bench.terminal import progress
from bench.timing import MIN_ROUNDS, Timing, describe_noise, measure, ratio
from engine.counting.hardware import (
    RATES,
    Ceilings,
    best_ceilings,
    clock,
    device_memory_bytes,
    measure_ceilings,
    require_memory,
)
from engine.counting.memory import inference_memory, training_memory
from engine.counting.params import count_params
from engine.errors import UserError
from engine.format import duration, finite
from engine.inference.decode import prepare_params
from engine.model.config import PRESETS, ModelConfig
from engine.model.weights.int8 import quantize
from engine.storage.digest import digest
from engine.text.batch import Batch

MAX_ROUNDS = 15
AFTERWARDS = 12.0  # seconds for digests, invariants and ceilings
FORWARD = "evaluation forward"  # the row of all ratios
READING = "chunked prefill into a slot"  # the row that reads the prompt of a request
# the pre-training step with it, which is no row of the table
CHECKPOINTED = "gradient checkpointing"
# the rows whose memory is drawn
DRAWN = (
    "pre-training step",
    "bottom half frozen",
    f"LoRA rank {ADAPTER.rank} on q and v",
    CHECKPOINTED,
    "prefill",
    "decode with 8 slots",
)
RESIDUAL_ROWS = 4  # sequences of which a block's residuals are counted
# Name, slots, and the type of matrices where it is not the model's own.
DECODES: tuple[tuple[str, int, str | None], ...] = (
    ("decode alone", 1, None),
    ("decode with 8 slots", 8, None),
    ("decode with 32 slots", 32, None),
    ("decode with 8, int8 weights", 8, "int8"),
    ("decode with 32, int8 weights", 32, "int8"),
)


def stage_table(
    preset_name: str,
    model_name: str | None,
    *,
    batch: int,
    context: int,
    price: float,
    max_time: float,
    fewest_rounds: bool,
    pictures: bool,
    command: str,
) -> dict[str, Any]:
    """Measures the table of the named model, else of a preset with random weights, in about
    `max_time` seconds in all.

    Returns its document. `price`: dollars an hour. `max_time` includes compiling; rounds are added
    while they fit. `fewest_rounds`: no more than a verdict needs. `pictures`: with the memory of
    each of DRAWN over time, what a block keeps for its backward pass, and, unless there are
    `fewest_rounds`, what a small model learns. `command`: the one that measures the claims again.
    Progress goes to stderr. Raises UserError for what does not fit or is not there.
    """
    begin = clock()
    model = find_model(preset_name, model_name, functools.partial(check_memory, batch=batch, context=context))
    progress("measuring this machine's ceilings, which utilisation is a share of ...")
    ceilings = measure_ceilings()
    cfg = model.cfg
    text = tokens_for(model, batch, context + 1)
    data = next_token_batch(text)
    frozen = prepare_params(cfg, model.params)
    int8 = quantize(frozen)
    rows = {row.name: row for row in _rows(cfg, model.params, frozen, int8, data, text[:, :-1])}
    digests = {name: weight_digests(row) for name, row in rows.items()}
    state_before = model_state(cfg, frozen, data)
    calls = {name: row.run for name, row in rows.items()}
    calls["uncached"] = uncached_decode(cfg, frozen, text[0, :-1])

    progress("warming up ...")
    seconds = _warm_up(calls)
    left = max_time - AFTERWARDS - (clock() - begin)
    rounds = MIN_ROUNDS
    if not fewest_rounds:
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(left / seconds)))
    overtime = rounds * seconds - left
    if overtime > 0:
        progress(
            f"This takes about {duration(overtime)} longer than --max-time {max_time:g}: the fewest rounds, "
            f"{rounds}, take {duration(rounds * seconds)}; a smaller --batch or --context takes less"
        )

    def report(done: int, total: int) -> None:
        progress(f"round {done} of {total}", replace=True)

    timings = measure(calls, rounds=rounds, warmups=0, report=report)
    rounds = len(timings["uncached"].seconds)  # fewer, past the deadline of --seconds
    # From here on seconds are those of a token.
    for name in timings.keys() & rows.keys():
        timings[name] = timings[name].scaled(1 / rows[name].tokens)

    progress(
        "measuring the ceilings again: this machine's speed may have changed since, and the best counts ..."
    )
    ceilings = best_ceilings(ceilings, measure_ceilings())
    learning = {}
    if pictures and not fewest_rounds:
        progress("fine-tuning a small model, which reads its text again and again ...")
        learning = measure_learning()
    progress("comparing weights and answers ...")
    document_rows = {}
    for name, row in rows.items():
        document_rows[name] = row_document(
            row, rows[FORWARD], timings, ceilings, digests=digests[name], price=price
        )
    generated = sum(row.tokens for row in rows.values() if row.stage == "decode") * (rounds + 1)
    params = count_params(cfg).total
    evidence = Evidence(
        command=command,
        rows=document_rows,
        timings=timings,
        params=params,
        price=price,
        uncached_tokens=context,
        learning=learning,
        bytes_per_weight=jnp.dtype(cfg.dtype).itemsize,
        generated=generated,
        changed_answers=serve_beside_others(cfg, frozen, min(2 * context, cfg.context))[0],
        before=state_before,
        after=model_state(cfg, frozen, data),
        int8_error=logits_error(cfg, frozen, int8, data),
    )
    document = {
        "machine": {name: getattr(ceilings, name) for name in ("device", "cores", "jax", "backend")},
        "model": {
            "name": model.name,
            "params": params,
            "layers": cfg.layers,
            "width": cfg.width,
            "dtype": cfg.dtype,
            "batch": batch,
            "context": context,
        },
        "ceilings": {rate: getattr(ceilings, rate) for rate in RATES},
        "rows": list(document_rows.values()),
        "claims": claims(evidence),
        "price_per_hour": price,
        "request_tokens": [PROMPT, COMPLETION],
        "rounds": rounds,
        "seconds": clock() - begin,
        "noise": describe_noise({name: timings[name] for name in rows}),
    }
    if pictures:
        document["learning"] = learning
        document |= _pictures(cfg, model.params, rows, data)
    return document


def _warm_up(calls: Mapping[str, Callable[[], Any]]) -> float:
    """Makes each call once, and returns the seconds of all."""
    begin = clock()
    for call in calls.values():
        jax.block_until_ready(call())
    return clock() - begin


def _pictures(cfg: ModelConfig, params: Any, rows: dict[str, Row], batch: Batch) -> dict[str, Any]:
    """Returns the memory of programs over time, none where the backend does not say, and what a
    block keeps for backward.
    """
    progress("finding what a step holds over time, and what a block keeps ...")
    remat = training_row(dataclasses.replace(cfg, remat="block"), params, training_kinds(cfg)[0], batch)
    possible = {**rows, CHECKPOINTED: remat}
    drawn = {name: possible[name] for name in DRAWN if name in possible}
    memory = {}
    try:
        memory = {name: memory_over_time(row.program).document() for name, row in drawn.items()}
    except UserError as error:  # of a backend: the table has been measured, and stands without them
        progress(f"without the memory of a step: {error}")
    return {
        "memory": memory,
        "config": cfg.to_json(),
        "residuals": block_residuals(cfg, params, np.asarray(batch.tokens[:RESIDUAL_ROWS])),
    }


def check_memory(cfg: ModelConfig, batch: int, context: int) -> None:
    """Raises UserError, with the largest preset that would fit if one does, when the table does not
    fit the memory.
    """
    limit = device_memory_bytes()
    remedy = "give a smaller --batch or --context"
    largest = 0
    for name, other in PRESETS.items():
        weights = count_params(other).total
        if weights > largest and table_bytes(other, batch, context) <= limit:
            largest = weights
            remedy = f"--preset {name} fits"
    require_memory(table_bytes(cfg, batch, context), "The stage table would need", f"{remedy}.", limit=limit)


def table_bytes(cfg: ModelConfig, batch: int, context: int) -> int:
    """Predicts the bytes of the whole table: the state of every row, and the largest step."""
    steps = [
        training_memory(cfg, batch, context, trainable=kind.trainable_paths) for kind in training_kinds(cfg)
    ]
    states = sum(step.trainable_weights + step.optimizer for step in steps)
    served = inference_memory(cfg, 32, context)
    working = max(step.total - step.params - step.optimizer for step in steps)
    # Float32 weights, as much for frozen halves in the compute type, served copies in two bytes and
    # one.
    return states + steps[0].params * 2 + 2 * served.params + served.cache * 2 + working


def _rows(
    cfg: ModelConfig, params: Any, frozen: Any, int8: Any, batch: Batch, tokens: np.ndarray
) -> Iterator[Row]:
    """Compiles and yields every row of the table. Inference reads `frozen` and `int8`."""
    makers: dict[str, Callable[[], Row | Iterable[Row]]] = {
        kind.name: functools.partial(training_row, cfg, params, kind, batch) for kind in training_kinds(cfg)
    }
    makers |= {
        FORWARD: functools.partial(evaluation_row, cfg, frozen, batch),
        "prefill": functools.partial(prefill_row, cfg, frozen, tokens),
        "chunked prefill into a slot, prefix-cache hit": functools.partial(
            served_rows, cfg, frozen, tokens[0]
        ),
    }
    for name, slots, weights in DECODES:
        served = int8 if weights else frozen
        makers[name] = functools.partial(
            decode_row, cfg, served, slots, tokens.shape[1], name=name, weights=weights
        )
    first_row = jax.tree.map(operator.itemgetter(slice(1)), batch)
    makers["by hand"] = functools.partial(by_hand_rows, cfg, params, first_row)
    for done, (name, make) in enumerate(makers.items(), 1):
        progress(f"compiling {done} of {len(makers)}: {name}", replace=True)
        rows = make()
        if isinstance(rows, Row):
            yield rows
        else:
            yield from rows


def weight_digests(row: Row) -> list[str]:
    return [digest({"leaf": leaf}) for leaf in jax.tree.leaves(row.weights())]


def row_document(
    row: Row,
    forward: Row,
    timings: dict[str, Timing],
    ceilings: Ceilings,
    *,
    digests: list[str],
    price: float,
) -> dict[str, Any]:
    """Returns a row of the JSON document; operations, bytes and seconds are those of a token.

    `digests`: `weight_digests` before the calls. `utilisation` is None where the ceiling could not
    be measured.
    """
    # a rate that is 0 is not known
    rates: dict[str, Any] = {rate: getattr(ceilings, rate) or math.nan for rate in RATES}
    ceilings = dataclasses.replace(ceilings, **rates)
    timing = timings[row.name]
    seconds = timing.median
    times = ratio(timing, timings[forward.name])
    flops = row.formula.by_pass.total / row.tokens
    interval = None
    if row is not forward and times.low is not None:
        interval = [times.low, times.high]
    usd_per_request = None
    if row.stage == "decode":
        usd_per_request = request_timing(timings[READING], timing).median / 3600 * price
    return {
        "name": row.name,
        "stage": row.stage,
        "weights": _change_of_weights(digests, weight_digests(row)),
        "flops_per_token": _flops_per_token(row),
        "counters_differ": row.counters_differ,
        "flop_ratio_to_forward": flops / (forward.formula.total / forward.tokens),
        "seconds_per_token": seconds,
        "spread": timing.spread,
        "time_ratio_to_forward": times.ratio,
        "time_ratio_interval": interval,
        "round_ratios": () if row is forward else times.round_ratios,
        "peak_bytes": row.peak_bytes,
        "predicted_peak_bytes": row.predicted_bytes,
        "bytes_per_token": row.traffic / row.tokens,
        "utilisation": finite(_utilisation(row, seconds, ceilings)),
        "utilisation_of": row.utilisation_of,
        "usd_per_million_tokens": seconds * 1e6 / 3600 * price,
        "usd_per_request": usd_per_request,
        "slots": row.slots,
        "layers": _flops_by_layer(row),
        "series": row.series,
        "bound_by": bound_by(row, seconds, ceilings),
    }


def _change_of_weights(before: list[str], after: list[str]) -> str:
    """Returns how many of the digests of weights differ: `identical`, `changed` (all) or `partly`."""
    differ = [old != new for old, new in zip(before, after)]
    if not any(differ):
        return "identical"
    if all(differ):
        return "changed"
    return "partly"


def _flops_per_token(row: Row) -> dict[str, float | None]:
    """Returns a token's operations by each counter and in each pass; None where one does not count."""
    flops = row.formula.by_pass
    counted: dict[str, Any] = {
        "formula": flops.total,
        "walker": None,
        "walker_elementwise": None,
        "xla": row.xla,
        "forward": flops.forward + flops.recompute,
        "dx": flops.dx,
        "dw": flops.dw,
        "optimizer": row.update,
    }
    if row.walker is not None:
        counted["walker"] = row.walker.matmul
        counted["walker_elementwise"] = row.walker.elementwise + row.update
    for name, number in counted.items():
        if number is not None:
            counted[name] = number / row.tokens
    return counted


def _flops_by_layer(row: Row) -> list[list[float]]:
    """Returns a token's operations in each layer: forward, and backward for inputs and for weights."""
    layers = []
    for layer in row.layers:
        flops = layer.by_pass
        passes = (flops.forward + flops.recompute, flops.dx, flops.dw)
        layers.append([number / row.tokens for number in passes])
    return layers


def _utilisation(row: Row, seconds: float, ceilings: Ceilings) -> float:
    """Returns the share of the ceiling that a token in `seconds` reaches: of operations a second where
    the row's utilisation is MFU, else of bytes a second.
    """
    if row.utilisation_of == "MFU":
        return row.formula.by_pass.total / row.tokens / seconds / ceilings.peak_flops(row.dtype)
    return row.traffic / row.tokens / seconds / (1e9 * ceilings.read_gbs)


def bound_by(row: Row, seconds: float, ceilings: Ceilings) -> str:
    """Returns what alone takes half of a token's `seconds` at this machine's best rates: memory,
    products, or neither.
    """
    if row.traffic / row.tokens / (1e9 * ceilings.read_gbs) >= seconds / 2:
        return "memory"
    products = row.walker.matmul if row.walker else row.formula.total
    if products / row.tokens / ceilings.peak_flops(row.dtype) >= seconds / 2:
        return "products"
    return "neither"

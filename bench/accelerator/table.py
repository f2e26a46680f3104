"""Measures the stage table's main rows at sizes that keep an accelerator busy, against the ceilings measured there."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from bench.cli import Json, describe_error, progress
from bench.models import next_token_batch, random_model, tokens_for
from bench.table.inference_rows import decode_row, evaluation_row, prefill_row
from bench.table.measure import FORWARD, PRODUCTS, row_document, weight_digests
from bench.table.row import Row
from bench.table.training_rows import training_kinds, training_row
from bench.timing import MIN_ROUNDS, describe_noise, measure
from engine.counting.hardware import Ceilings, clock
from engine.counting.memory import training_memory
from engine.counting.params import count_params
from engine.errors import UserError
from engine.format import format_bytes
from engine.inference.decode import prepare_params
from engine.model.config import ModelConfig, preset
from engine.model.weights.int8 import quantize

TRAINED = ("pre-training step", "LoRA rank 8 on q and v")
INT8 = "decode with 32, int8 weights"
GOALS = {"pre-training step": 0.60, "decode alone": 0.80}  # of the ceiling
SHARE = 0.5  # of the memory, for a step: weights of other rows lie beside it
BATCHES = (64, 32, 16, 8, 4, 2)


def measure_preset(
    name: str, ceilings: Ceilings, *, context: int, memory: int, rounds: int, price: float, deadline: float
) -> Json:
    """Measures one preset with random weights, at the largest batch that fits `memory` bytes; returns its table's document.

    `price`: dollars an hour. A row that fails, or whose rounds would not end by `deadline` (of `clock`), is named with its
    reason, and the others are measured. Raises UserError for an unknown preset, and where not even the smallest batch fits.
    """
    cfg = dataclasses.replace(preset(name), scan=jax.default_backend() != "cpu")
    context = min(context, cfg.context)
    cfg, batch = fit(name, cfg, context, memory)
    model = random_model(name, cfg)
    text = tokens_for(model, batch, context + 1)
    data, frozen = next_token_batch(text), prepare_params(cfg, model.params)
    int8 = quantize(frozen)
    kinds = {kind.name: kind for kind in training_kinds(cfg)}
    row_makers: dict[str, Callable[[], Row]] = {
        FORWARD: lambda: evaluation_row(cfg, frozen, data),
        **{each: functools.partial(training_row, cfg, model.params, kinds[each], data) for each in TRAINED},
        "prefill": lambda: prefill_row(cfg, frozen, text[:, :-1]),
        "decode alone": lambda: decode_row(cfg, frozen, 1, context, name="decode alone", weights=None),
        "decode with 32 slots": lambda: decode_row(cfg, frozen, 32, context, name="decode with 32 slots", weights=None),
        INT8: lambda: decode_row(cfg, int8, 32, context, name=INT8, weights="int8"),
    }
    rows: dict[str, Row] = {}
    left_out, needed = {}, 0.0  # seconds of the fewest rounds, and of what is done before and after them
    for each, make in row_makers.items():
        if rows and clock() + needed > deadline:
            left_out[each] = "no time was left; --max-time gives more"
            continue
        progress(f"{name}: compiling {each}")
        try:
            row = make()
            begin = clock()
            jax.block_until_ready(row.run())
        except Exception as error:
            left_out[each] = describe_error(error)
        else:
            rows[each] = row
            needed += (MIN_ROUNDS + 2) * (clock() - begin)
    if FORWARD not in rows:
        raise UserError(f"{name} cannot be evaluated at {batch} x {context} tokens: {left_out[FORWARD]}")
    digests = {each: weight_digests(row) for each, row in rows.items()}
    calls = {each: row.run for each, row in rows.items()}
    calls |= {each + PRODUCTS: row.products for each, row in rows.items() if row.products}
    timings = measure(
        calls,
        rounds=rounds,
        report=lambda done, total: progress(f"{name}: round {done} of {total}", replace=True),
        until=deadline,
    )
    noise = describe_noise({each: timings[each] for each in rows})
    tokens = {each + part: row.tokens for each, row in rows.items() for part in ("", PRODUCTS)}
    timings = {each: timing.scaled(1 / tokens[each]) for each, timing in timings.items()}
    lines = []
    for each, row in rows.items():
        line = row_document(row, rows[FORWARD], timings, ceilings, digests[each], price)
        goal, used = GOALS.get(each), line["utilisation"]
        met = None if goal is None or used is None else used >= goal
        lines.append(line | {"compile_seconds": row.compile_seconds, "goal": goal, "met": met})
    return {
        "model": {
            "name": name, "params": count_params(cfg).total, "layers": cfg.layers, "width": cfg.width, "dtype": cfg.dtype,
            "batch": batch, "context": context, "scan": cfg.scan, "remat": cfg.remat,
        },
        "rows": lines, "left_out": left_out, "rounds": len(timings[FORWARD].seconds), "noise": noise,
    }  # fmt: skip


def fit(name: str, cfg: ModelConfig, context: int, memory: int) -> tuple[ModelConfig, int]:
    """Returns the config and the largest batch whose training step takes SHARE of `memory`, with gradient checkpointing
    only where no batch fits without. Raises UserError when none fits."""
    for remat in ("none", "block"):
        changed: Any = dataclasses.replace(cfg, remat=remat)
        for batch in BATCHES:
            if training_memory(changed, batch, context).total <= SHARE * memory:
                return changed, batch
    raise UserError(f"{name} does not fit {format_bytes(memory)} of memory; give smaller --presets, or a smaller --context.")

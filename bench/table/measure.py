"""One model through every row of the stage table: compiled, run in turns, its weights compared, and made a document."""

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError

FEWEST, MOST = 3, 15  # rounds
AFTERWARDS = 12.0  # seconds kept for digests, observations and the second look at the ceilings


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to measure: sizes, the price in dollars an hour, seconds the whole may take, a folder to be written to."""

    preset: str
    model: str | None
    batch: int
    context: int
    price: float
    max_time: float
    quick: bool
    out: Path | None


def stage_table(asked: Asked) -> dict[str, Any]:
    """Measures the table and returns its document. Progress goes to stderr. Raises UserError for what cannot be done."""
    from engine.counting.hardware import clock

    begin = clock()
    _check(asked)
    from bench.models import drawn, loaded
    from bench.table.estimate import check_memory, takes_long
    from engine.device import start_jax
    from engine.model.config import preset
    from engine.storage.find import read_config

    check_memory(read_config(asked.model) if asked.model else preset(asked.preset), asked.batch, asked.context)
    start_jax()
    import jax

    from bench.timing import each, measure, noise, told_apart
    from engine.counting.hardware import measure_ceilings
    from engine.counting.params import count_params
    from engine.storage.digest import digest

    _say("measuring what this machine can do ...")
    ceilings = measure_ceilings()
    model = loaded(asked.model) if asked.model else drawn(asked.preset, preset(asked.preset))
    long = takes_long(model.cfg, asked.batch, asked.context, asked.max_time - AFTERWARDS, FEWEST, ceilings)
    if long:
        _say(long)
    built = list(_built(model, asked))
    rows = [row for row, _ in built]
    extra = {name: call for _, more in built for name, call in more.items()}
    by_name = {row.name: row for row in rows}
    forward = by_name["evaluation forward"]
    before = {row.name: _leaf_digests(row.weights()) for row in rows}
    from bench.table.invariants import loss_of, observe

    frozen, batch, int8 = extra.pop("frozen"), extra.pop("batch"), extra.pop("int8")
    model_before = (loss_of(model.cfg, frozen, batch), digest(frozen))
    alone = {f"{row.name}: products": row for row in rows if row.products}
    runs = {row.name: row.run for row in rows} | {name: row.products for name, row in alone.items()} | extra
    _say("warming up ...")
    started = clock()
    for call in runs.values():
        jax.block_until_ready(call())
    warm = clock() - started
    left = asked.max_time - AFTERWARDS - (clock() - begin)
    rounds = FEWEST if asked.quick else max(FEWEST, min(MOST, int(left / warm)))
    report = lambda done, total: _say(f"round {done} of {total}", same=True)
    timings = measure(runs, rounds=rounds, warmups=0, report=report)
    # From here on seconds are those of a token: rows differ in how many a call has.
    tokens = {name: row.tokens for name, row in (by_name | alone).items()} | dict.fromkeys(extra, 1)
    timings = {name: each(timing, tokens[name]) for name, timing in timings.items()}
    over = lambda name, other: told_apart(timings[name], timings[other])
    value = lambda name, other: ratio.value if (ratio := over(name, other)) else None
    _say("comparing weights and answers ...")
    again = measure_ceilings()
    rates = ("bf16_gflops", "f32_gflops", "int8_gflops", "read_gbs", "update_gbs")
    ceilings = dataclasses.replace(ceilings, **{rate: max(getattr(ceilings, rate), getattr(again, rate)) for rate in rates})
    changed = {row.name: _changed(before[row.name], _leaf_digests(row.weights())) for row in rows}

    found = {
        row.name: _document(
            row, timings, over(row.name, forward.name), forward, ceilings, changed[row.name], asked.price
        )
        for row in rows
    }  # fmt: skip
    drawn_tokens = sum(row.tokens for row in rows if row.stage == "decode") * (rounds + 1)
    seen = observe(
        model.cfg, frozen, batch, count=count_params(model.cfg).total, length=asked.context, before=model_before,
        generated=drawn_tokens, uncached=(timings["uncached"].median, asked.context), int8=int8,
    )  # fmt: skip
    from bench.table.claims import claims

    words = ["python", "-m", "bench", *_words(asked)]
    return {
        "machine": {"device": ceilings.device, "cores": ceilings.cores, "jax": ceilings.jax, "backend": ceilings.backend},
        "model": {
            "name": model.name, "params": count_params(model.cfg).total, "layers": model.cfg.layers, "width": model.cfg.width,
            "dtype": model.cfg.dtype, "batch": asked.batch, "context": asked.context,
        },
        "ceilings": {rate: getattr(ceilings, rate) for rate in rates},
        "rows": list(found.values()),
        "claims": claims(found, seen, asked.price, value),
        "price_per_hour": asked.price,
        "rounds": rounds,
        "seconds": clock() - begin,
        "noise": noise({row.name: timings[row.name] for row in rows}),
        "command": shlex.join(words),
    }  # fmt: skip


def _built(model: Any, asked: Asked) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(row, what else its maker has to give) for every row of the table, each compiled as it is asked for."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bench.models import tokens_for
    from bench.table.by_hand_rows import by_hand_rows
    from bench.table.inference_rows import decode_row, evaluation_row, prefill_row, uncached
    from bench.table.slot_rows import served_rows
    from bench.table.training_rows import learners, training_row
    from engine.inference.decode import for_inference
    from engine.inference.quantize import quantize
    from engine.text.batch import Batch

    cfg, params = model.cfg, model.params
    B, T = asked.batch, asked.context
    text = tokens_for(model, B, T + 1)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = jax.tree.map(jnp.asarray, Batch(text[:, :-1], text[:, 1:], np.ones((B, T), bool), positions, None))
    frozen = for_inference(cfg, params)
    int8 = quantize(frozen)
    ways = learners(cfg)
    total = len(ways) + 9
    for number, learner in enumerate(ways, 1):
        _say(f"compiling {number} of {total}: {learner.name}", same=True)
        yield training_row(cfg, params, learner, batch), {}
    said = lambda number, name: _say(f"compiling {len(ways) + number} of {total}: {name}", same=True)
    said(1, "evaluation forward")
    yield evaluation_row(cfg, frozen, batch), {"frozen": frozen, "batch": batch, "int8": int8}
    said(2, "prefill")
    yield prefill_row(cfg, frozen, text[:, :-1]), {"uncached": uncached(cfg, frozen, text[0, :-1])}
    said(3, "a prompt as it is served")
    for row in served_rows(cfg, frozen, text[0, :-1]):
        yield row, {}
    decodes: list[tuple[int, str, Any, str | None]] = [
        (1, "decode alone", frozen, None),
        (8, "decode with 8 slots", frozen, None),
        (32, "decode with 32 slots", frozen, None),
        (8, "decode with 8, int8 weights", int8, "int8"),
        (32, "decode with 32, int8 weights", int8, "int8"),
    ]
    for number, (slots, name, weights, kind) in enumerate(decodes, 4):
        said(number, name)
        series = "int8 weights" if kind else None
        yield decode_row(cfg, weights, slots, T, name=name, series=series, weights=kind), {}
    few = jax.tree.map(lambda x: x[:1], batch)
    said(9, "by hand")
    for row in by_hand_rows(cfg, params, few):
        yield row, {}


def _document(
    row: Any, timings: dict[str, Any], times: Any, forward: Any, ceilings: Any, changed: str, price: float
) -> dict[str, Any]:
    """A row as the JSON document has it: everything a token."""
    from bench.table.explain import ceiling, why, why_peak

    timing, ahead, alone = timings[row.name], timings[forward.name].median, timings.get(f"{row.name}: products")
    took = timing.median
    per = lambda number: None if number is None else number / row.tokens
    flops = row.formula
    relative = per(flops.total) / (forward.formula.total / forward.tokens)
    used = per(row.moved) / took / (1e9 * ceilings.read_gbs)
    if row.bound == "MFU":
        used = per(flops.total) / took / ceiling(row, ceilings)
    return {
        "name": row.name, "stage": row.stage, "weights": changed,
        "flops_per_token": {
            "formula": per(flops.total), "walker": per(row.walker.matmul) if row.walker else None,
            "walker_elementwise": per(row.walker.elementwise + row.update) if row.walker else None,
            "xla": per(row.xla.flops) if row.xla else None, "forward": per(flops.forward + flops.recompute),
            "dx": per(flops.dx), "dw": per(flops.dw), "optimizer": per(row.update),
        },
        "flop_ratio_to_forward": relative, "seconds_per_token": took, "spread": timing.spread,
        "time_ratio_to_forward": times.value if times else None,
        "time_ratio_spread": times.spread if times and row is not forward else None,
        "predicted_seconds_per_token": relative * ahead,
        "peak_bytes": row.peak_bytes, "predicted_peak_bytes": sum(row.memory.values()), "memory": row.memory,
        "bytes_per_token": per(row.moved), "utilisation": used, "utilisation_of": row.bound,
        "usd_per_million_tokens": took * 1e6 / 3600 * price, "tokens_per_call": row.tokens, "slots": row.slots,
        "series": row.series, "why": why(row, took, forward, ahead, ceilings, alone.median if alone else None),
        "why_peak": why_peak(row),
    }  # fmt: skip


def _leaf_digests(weights: Any) -> list[str]:
    """A digest for each leaf, in the tree's order."""
    import jax

    from engine.storage.digest import digest

    return [digest({"leaf": leaf}) for leaf in jax.tree.leaves(weights)]


def _changed(before: list[str], after: list[str]) -> str:
    """Whether all leaves have other bits than before, some, or none."""
    moved = sum(one != other for one, other in zip(before, after))
    return "identical" if not moved else "changed" if moved == len(before) else "partly"


def _check(asked: Asked) -> None:
    for name, least in (("batch", 2), ("context", 64)):
        if getattr(asked, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(asked, name)}.")
    if asked.batch % 2 or asked.context % 64:
        raise UserError(
            f"--batch must be even, for preferences come in pairs, and --context a multiple of 64, the tokens of a prefill: "
            f"got {asked.batch} and {asked.context}."
        )
    for name in ("price", "max_time"):
        if not 0 < getattr(asked, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be a number above 0, not {getattr(asked, name):g}.")
    if asked.out is not None:
        import tempfile

        try:
            asked.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=asked.out).close()
        except OSError as error:
            raise UserError(f"--out {asked.out} cannot be written: {error.strerror}. Choose another folder.") from None


def _words(asked: Asked) -> list[str]:
    """The flags that differ from what is measured when none is given."""
    words = ["--model", asked.model] if asked.model else ["--preset", asked.preset] if asked.preset != "nano" else []
    for name, usual in (("batch", 8), ("context", 256), ("price", 0.10)):
        if getattr(asked, name) != usual:
            words += [f"--{name}", f"{getattr(asked, name):g}"]
    return words + ["--quick"] * asked.quick


def _say(text: str, same: bool = False) -> None:
    """A line of progress on stderr; on a terminal those of one task take each other's place."""
    terminal = sys.stderr.isatty()
    end = "\r" if same and terminal else "\n"
    print(f"\x1b[2K{text}" if terminal else text, end=end, file=sys.stderr, flush=True)

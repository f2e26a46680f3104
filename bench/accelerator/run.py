"""Runs all of `bench.accelerator` in its time: checks, one table a preset, peers."""

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from bench.accelerator.checks import Check, check_greedy, checks_of_serving, checks_of_training
from bench.accelerator.table import measure_preset
from bench.cli import Json, Shape, progress
from bench.models import random_model
from bench.peers.measure import measure_inference, measure_training
from bench.peers.process import start_peer
from engine.counting.hardware import RATES, clock, device_memory_bytes, measure_ceilings
from engine.errors import UserError
from engine.model.config import ModelConfig, preset

DTYPES: tuple[Any, ...] = ("float32", "bfloat16")
PEER_SHAPE, PEER_PRESET, PROMPT, NEW = Shape(12, 768, 1024, 8), "smollm2-135m", 256, 65
MAKE_VENV = "python3 -m venv peers && peers/bin/pip install vllm"  # which brings torch


def run(
    presets: Sequence[str], *, context: int, rounds: int, price: float, max_time: float, peers: bool, peer_python: Path | None
) -> Json:
    """Returns the document: `checks`, `tables` and `peers`, each begun only within `max_time` seconds.

    Options are the flags of `bench.accelerator`.
    """
    begin = clock()
    progress("measuring what this device can do")
    ceilings = measure_ceilings()
    checks = list(all_checks())
    tables, left_out = [], []
    for name in presets:
        if clock() - begin > max_time:
            left_out.append(f"{name}: no time was left; --max-time gives more")
            continue
        try:
            measured = measure_preset(
                name, ceilings, context=context, memory=device_memory_bytes(), rounds=rounds, price=price
            )  # fmt: skip
        except UserError as error:
            left_out.append(f"{name}: {error}")
        else:
            tables.append(measured)
    document = {
        "machine": {name: getattr(ceilings, name) for name in ("device", "cores", "jax", "backend")},
        "ceilings": {rate: getattr(ceilings, rate) for rate in RATES},
        "price_per_hour": price, "checks": [check._asdict() | {"holds": check.holds} for check in checks], "tables": tables,
        "peers": [], "absent": [], "left_out": left_out,
    }  # fmt: skip
    if peers:
        measure_peers(document, rounds, peer_python, lambda: clock() - begin < max_time)
    return document | {"seconds": clock() - begin}


def checked_models() -> dict[str, ModelConfig]:
    """Returns two small models that together have most of what a model can: q/k norm, shared key heads, heads tied and not."""
    small = dataclasses.replace(preset("smollm2-135m"), layers=2, vocab=4096, context=1024)
    return {"nano": preset("nano"), "two layers of smollm2": small}


def all_checks() -> Iterator[Check]:
    """Yields every check, on JAX's device beside the processor."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    for name, plain in checked_models().items():
        params = random_model(name, plain).params
        typed = [dataclasses.replace(plain, dtype=dtype) for dtype in DTYPES]
        progress(f"checking {name} beside the processor")
        checks = itertools.chain(
            *(checks_of_training(cfg, params, device, cpu) for cfg in typed), [check_greedy(typed[0], params, device, cpu)],
            checks_of_serving(plain, params),
        )  # fmt: skip
        yield from (check._replace(name=f"{name}: {check.name}") for check in checks)


def measure_peers(document: Json, rounds: int, python: Path | None, in_time: Any) -> None:
    """Adds rows beside PyTorch (a training step) and vLLM (prefill and decoding) where they are installed."""
    rows, absent = document["peers"], document["absent"]
    with tempfile.TemporaryDirectory() as folder:
        for script, needs in (("torch_peer.py", "torch"), ("vllm_peer.py", "vllm")):
            if not in_time():
                document["left_out"].append(f"{needs}: no time was left; --max-time gives more")
                continue
            try:
                with start_peer(python, script, absent, needs, MAKE_VENV) as peer:
                    if peer and needs == "torch":
                        measure_training(PEER_SHAPE, "bfloat16", rounds, peer, Path(folder), rows, absent)
                    elif peer:
                        measure_inference(
                            PEER_PRESET, PROMPT, NEW, "bfloat16", rounds, peer, Path(folder), rows, absent, name=needs
                        )  # fmt: skip
            except UserError as error:  # one peer's trouble is not the other's
                document["left_out"].append(str(error))

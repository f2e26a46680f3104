"""Runs all of `bench.accelerator` in its time: checks, one table a preset, peers."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from bench.accelerator.checks import Check, check_greedy, check_prefill, checks_of_serving, checks_of_training
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
    """Returns the document: `checks`, `tables` and `peers`, each table begun only within `max_time` seconds.

    Options are the flags of `bench.accelerator`.
    """
    begin = clock()
    progress("measuring what this device can do")
    ceilings = measure_ceilings()
    checks = [check._asdict() | {"holds": check.holds} for check in all_checks()]
    document: Json = {
        "machine": {name: getattr(ceilings, name) for name in ("device", "cores", "jax", "backend")},
        "ceilings": {rate: getattr(ceilings, rate) for rate in RATES},
        "price_per_hour": price, "checks": checks, "tables": [], "peers": [], "absent": [], "left_out": [],
    }  # fmt: skip
    if peers:  # first, for JAX keeps the memory that the tables take
        measure_peers(document, rounds, peer_python)
    for name in presets:
        if clock() - begin > max_time:
            document["left_out"].append(f"{name}: no time was left; --max-time gives more")
            continue
        try:
            memory = device_memory_bytes()
            document["tables"].append(
                measure_preset(name, ceilings, context=context, memory=memory, rounds=rounds, price=price)
            )  # fmt: skip
        except UserError as error:
            document["left_out"].append(f"{name}: {error}")
    return document | {"seconds": clock() - begin}


def checked_models() -> dict[str, ModelConfig]:
    """Returns two small models that together have most of what a model can: q/k norm, shared key heads, heads tied and not."""
    small = dataclasses.replace(preset("smollm2-135m"), layers=2, vocab=4096, context=1024)
    return {"nano": preset("nano"), "two layers of smollm2": small}


def all_checks() -> Iterator[Check]:
    """Yields every check, on JAX's device beside the processor; one that cannot run fails, with the reason as its name."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    for name, plain in checked_models().items():
        params = random_model(name, plain).params
        progress(f"checking {name} beside the processor")
        for dtype in DTYPES:
            cfg = dataclasses.replace(plain, dtype=dtype)
            arguments = cfg, params, device, cpu
            # Greedy tokens in float32, where no two logits are nearly alike.
            inference_checks = [functools.partial(check_greedy, *arguments)]
            if dtype == "bfloat16":
                inference_checks = [
                    functools.partial(check_prefill, *arguments),
                    functools.partial(checks_of_serving, cfg, params),
                ]
            groups: list[Callable[[], Iterable[Check]]] = [functools.partial(checks_of_training, *arguments), *inference_checks]
            # A GPU would multiply float32 with 10 bits (TF32); other types have no other precision.
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                for group in groups:
                    try:
                        yield from (check._replace(name=f"{name}: {check.name}") for check in group())
                    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
                        yield Check(f"{name}, {dtype}: {str(error).splitlines()[0][:120]}", 1.0, 0.0)


def measure_peers(document: Json, rounds: int, python: Path | None) -> None:
    """Adds to the document rows beside PyTorch (a training step) and vLLM (prefill and decoding) where they are installed."""
    rows, absent = document["peers"], document["absent"]
    with tempfile.TemporaryDirectory() as folder:
        for script, needs in (("torch_peer.py", "torch"), ("vllm_peer.py", "vllm")):
            if jax.default_backend() == "tpu":
                document["left_out"].append(f"{needs}: it would compute on this machine's processor")
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

"""Runs all of `bench.accelerator` in its time: ceilings, checks, peers, one table a preset."""

import contextlib
import dataclasses
import functools
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from bench.accelerator.checks import Check, check_greedy, check_prefill, checks_of_serving, checks_of_training
from bench.accelerator.table import measure_preset
from bench.cli import Json, Shape, describe_error, progress
from bench.models import random_model
from bench.peers.measure import measure_inference, measure_training
from bench.peers.process import PeerError, start_peer
from engine.counting.hardware import RATES, Ceilings, clock, device_memory_bytes, measure_ceilings
from engine.device import cores, device_name
from engine.errors import UserError
from engine.model.config import ModelConfig, preset

DTYPES: tuple[Any, ...] = ("float32", "bfloat16")
PEER_SHAPE, PEER_PRESET, PROMPT, NEW = Shape(12, 768, 1024, 8), "smollm2-135m", 256, 65
PEERS = {"torch": "torch_peer.py", "vllm": "vllm_peer.py"}
MAKE_VENV = "python3 -m venv peers && peers/bin/pip install vllm"  # which brings torch


def run(
    presets: Sequence[str], *, context: int, rounds: int, price: float, max_time: float, peers: bool, peer_python: Path | None,
    save: Callable[[Json], Any],
) -> Json:  # fmt: skip
    """Returns the document: `checks`, `tables` and `peers`, in about `max_time` seconds.

    Options are the flags of `bench.accelerator`. `save` takes the document before the first section and after each. A section
    that fails is named in `left_out`, with its traceback in `errors` if nobody foresaw it, and the others are run.
    """
    begin = clock()
    document: Json = {
        "machine": {
            "device": device_name(), "cores": cores(), "jax": jax.__version__, "backend": jax.default_backend()
        },
        "ceilings": dict.fromkeys(RATES, 0.0), "price_per_hour": price,
        "checks": [], "tables": [], "peers": [], "absent": [], "left_out": [], "errors": {}, "seconds": 0.0,
    }  # fmt: skip
    sections: dict[str, Callable[[], None]] = {
        "ceilings": lambda: add_ceilings(document),
        "checks": lambda: add_checks(document),
    }
    if peers:  # before the tables, for JAX keeps the memory that they take
        sections |= {needs: functools.partial(add_peer, document, needs, rounds, peer_python, max_time / 4) for needs in PEERS}
    sections |= {
        name: functools.partial(add_table, document, name, context=context, rounds=rounds, deadline=begin + max_time)
        for name in presets
    }
    save(document)
    for name, add in sections.items():
        try:
            add()
        except Exception as error:
            if not isinstance(error, UserError | PeerError):
                document["errors"][name] = traceback.format_exc()
            document["left_out"].append(f"{name}: {describe_error(error)}")
            progress(document["left_out"][-1])
        document["seconds"] = clock() - begin
        with contextlib.suppress(UserError):  # the folder could be written before; all is printed at the end too
            save(document)
    return document


def add_ceilings(document: Json) -> None:
    """Measures the device's best rates; they stay 0 if that fails."""
    progress("measuring what this device can do")
    ceilings = measure_ceilings()
    document["ceilings"] = {rate: getattr(ceilings, rate) for rate in RATES}


def add_checks(document: Json) -> None:
    """Adds every check, on JAX's device beside the processor."""
    for check in all_checks():
        document["checks"].append(check._asdict() | {"holds": check.holds})


def add_table(document: Json, name: str, *, context: int, rounds: int, deadline: float) -> None:
    """Adds the table of a preset. Raises UserError when it does not fit, or the longest so far would not end by `deadline`."""
    begin, price = clock(), document["price_per_hour"]
    if begin + max((table["seconds"] for table in document["tables"]), default=0.0) > deadline:
        raise UserError("no time was left; --max-time gives more")
    table = measure_preset(
        name, Ceilings(**document["machine"], **document["ceilings"]), context=context, memory=device_memory_bytes(),
        rounds=rounds, price=price, deadline=deadline,
    )  # fmt: skip
    document["tables"].append(table | {"seconds": clock() - begin})


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
                    except Exception as error:
                        yield Check(f"{name}, {dtype}: {describe_error(error)[:120]}", 1.0, 0.0)


def add_peer(document: Json, needs: str, rounds: int, python: Path | None, limit: float) -> None:
    """Adds rows beside PyTorch (a training step) or vLLM (prefill and decoding), the library that it `needs`, if installed.

    Raises UserError when the peer takes more than `limit` seconds, PeerError when it fails.
    """
    if jax.default_backend() == "tpu":
        raise UserError("it would compute on this machine's processor")
    rows, absent = document["peers"], document["absent"]
    with tempfile.TemporaryDirectory() as folder, start_peer(python, PEERS[needs], absent, needs, MAKE_VENV) as peer:
        if not peer:
            return
        timer = threading.Timer(limit, peer.process.kill)
        timer.start()
        try:
            if needs == "torch":
                measure_training(PEER_SHAPE, "bfloat16", rounds, peer, Path(folder), rows, absent)
            else:
                measure_inference(
                    PEER_PRESET, PROMPT, NEW, "bfloat16", rounds, peer, Path(folder), rows, absent, name=needs
                )  # fmt: skip
        except (PeerError, UserError):
            if timer.finished.is_set():
                raise UserError(f"it took more than {limit:.0f} s; --max-time gives more") from None
            raise
        finally:
            timer.cancel()

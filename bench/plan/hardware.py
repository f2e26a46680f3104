"""The devices of a plan: a known accelerator, one that flags describe, or this machine as measured."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from bench.cli import Shape
from bench.machine import Json
from bench.terminal import progress
from engine.counting.accelerators import Accelerator, read_accelerators
from engine.errors import UserError, did_you_mean
from engine.files import cache_folder, read_limited, write_cached_json

HERE = "here"
MAX_BYTES = 2**16  # that are read of a calibration, which has about a thousand
accelerators = functools.cache(read_accelerators)
# whose steps are timed
_SHAPES = (Shape(4, 256, 256, 8), Shape(6, 384, 256, 8), Shape(6, 512, 256, 8))


def find_hardware(name: str, flags: dict[str, float | None]) -> Accelerator:
    """Returns the accelerator of a name, with what `flags` say of its fields in place of the
    file's.

    Raises UserError for an unknown one, for `custom` without its three numbers, and for `here`
    before it was measured.
    """
    name = name.lower()
    fields: dict[str, Any] = {field: value for field, value in flags.items() if value is not None}
    if name == "custom":
        if not {"bf16_tflops", "memory_gbs", "memory_gb"} <= fields.keys():
            raise UserError("--hardware custom needs --peak (TFLOP/s), --bandwidth (GB/s) and --memory (GB).")
        device = Accelerator("custom", 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, "the flags")
    elif name == HERE:
        device = Accelerator(**read_calibration()["device"])
    elif name not in accelerators():
        known = list(accelerators())
        raise UserError(
            f"There is no hardware {name!r}.{did_you_mean(name, known)} "
            f"Known: {', '.join(known)}, {HERE} (this machine), "
            "or custom with --peak, --bandwidth and --memory."
        )
    else:
        device = accelerators()[name]
    price = fields.pop("price", None)
    if price:
        device = dataclasses.replace(device, usd_low=price, usd_high=price, price_source="--price")
    return dataclasses.replace(device, **fields)


@dataclasses.dataclass(frozen=True)
class DeviceNumbers:
    """What the formulas take of a device's data sheet, in FLOPs, bytes, seconds and dollars; 0 where
    no source has it.
    """

    name: str
    peak: float  # FLOPs a second in bfloat16
    eight: float  # FLOPs a second in 8 bits
    bandwidth: float  # bytes a second of its memory
    memory: float
    together: int  # devices of a node
    near: float  # bytes a second to a device of the same node
    far: float  # bytes a second to another node
    watts: float
    low: float  # dollars a device-hour, at least
    high: float  # dollars a device-hour, at most
    price: str  # the source of these


def numbers(device: Accelerator) -> DeviceNumbers:
    """Returns a device's data sheet in the units of the formulas. A device without products in 8 bits
    has the peak of bfloat16 there.
    """
    eight = device.eight_bit_tflops or device.bf16_tflops
    return DeviceNumbers(
        name=device.name,
        peak=1e12 * device.bf16_tflops,
        eight=1e12 * eight,
        bandwidth=1e9 * device.memory_gbs,
        memory=1e9 * device.memory_gb,
        together=device.node,
        near=1e9 * device.node_gbs,
        far=1e9 * device.network_gbs,
        watts=device.watts,
        low=device.usd_low,
        high=device.usd_high,
        price=device.price_source,
    )


def read_calibration() -> dict[str, Any]:
    """Returns what `--calibrate` measured. Raises UserError when it has not, or when its file is
    damaged.
    """
    file = _calibration_file()
    if not file.exists():
        raise UserError(
            "This machine was not measured yet: python -m bench.plan --calibrate does, in about 30 s."
        )
    try:
        saved = json.loads(read_limited(file, MAX_BYTES))
        if (
            Accelerator(**saved["device"]).bf16_tflops > 0
            and len([math.log(share) for share in saved["shares"]]) == 3
        ):
            return saved
        raise ValueError
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{file} is damaged: measure again with python -m bench.plan --calibrate.") from None


def _calibration_file() -> Path:
    return cache_folder("plan") / "calibration.json"


def calibrate() -> Json:
    """Measures, saves in the user's cache what `--hardware here` reads, and returns it."""
    from engine.device import start_jax

    start_jax()
    from bench.models import make_step, make_step_inputs
    from bench.timing import measure
    from engine.counting.flops import train_flops
    from engine.counting.hardware import best_ceilings, device_memory_bytes, measure_ceilings
    from engine.training.optimizer import OptimizerConfig

    progress("measuring this machine's peak ...")
    ceilings = measure_ceilings()
    rates = []
    for shape in _SHAPES:
        progress(f"training steps of {shape} ...")
        inputs = make_step_inputs(shape, "bfloat16")
        step = make_step(inputs, OptimizerConfig())
        timing = measure({str(shape): step}, rounds=5, warmups=2)[str(shape)]
        flops = train_flops(inputs.cfg, shape.tokens, attention="causal").total
        rates.append(shape.batch * shape.tokens * flops / timing.median)
    ceilings = best_ceilings(ceilings, measure_ceilings())
    device = Accelerator(
        HERE,
        ceilings.bf16_gflops / 1e3,
        device_memory_bytes() / 1e9,
        ceilings.read_gbs,
        1,
        0,
        0,
        ceilings.int8_gflops / 1e3,
        0,
        0,
        0,
        f"{ceilings.device}, {ceilings.cores} cores, measured",
    )
    shares = sorted(rate / 1e9 / ceilings.bf16_gflops for rate in rates)
    document = {"device": dataclasses.asdict(device), "shares": shares}
    write_cached_json(_calibration_file(), document)
    print(f"{device.source}: {ceilings.bf16_gflops:,.0f} GFLOP/s in bfloat16, {device.memory_gbs:.0f} GB/s")
    print(f"training steps reach {shares[0]:.0%} to {shares[-1]:.0%} of it; give --watts for energy")
    return document

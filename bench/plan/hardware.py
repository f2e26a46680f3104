"""The devices of a plan: a known accelerator, one that flags describe, or this machine as it was calibrated."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

from bench.plan.efficiency import Efficiency, predict_efficiency
from bench.plan.published import accelerators
from engine.counting.accelerators import Accelerator
from engine.errors import UserError, did_you_mean
from engine.files import cache_root

HERE = "here"


def find_hardware(name: str, flags: dict[str, float | None]) -> Accelerator:
    """Returns the accelerator of a name, with what `flags` say of its fields in place of the file's.

    Raises UserError for an unknown one, for `custom` without its three numbers, and for `here` before it was measured.
    """
    name = name.lower()
    given: dict[str, Any] = {field: value for field, value in flags.items() if value is not None}
    if name == "custom":
        if not {"bf16_tflops", "memory_gbs", "memory_gb"} <= given.keys():
            raise UserError("--hardware custom needs --peak (TFLOP/s), --bandwidth (GB/s) and --memory (GB).")
        device = Accelerator("custom", 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, "the flags")
    elif name == HERE:
        device = Accelerator(**read_calibration()["device"])
    elif not (found := accelerators().get(name)):
        known = list(accelerators())
        raise UserError(
            f"There is no hardware {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}, {HERE} (this machine), or "
            "custom with --peak, --bandwidth and --memory."
        )
    else:
        device = found
    if price := given.pop("price", None):
        device = dataclasses.replace(device, usd_low=price, usd_high=price, price_source="--price")
    return dataclasses.replace(device, **given)


def numbers(device: Accelerator, **others: Any) -> Any:
    """Returns what the formulas take of a device; `others`: the fields of its Efficiency, and what `fit_serving` found."""
    eight = device.eight_bit_tflops or device.bf16_tflops
    return SimpleNamespace(
        name=device.name, peak=1e12 * device.bf16_tflops, eight=1e12 * eight, bandwidth=1e9 * device.memory_gbs,
        memory=1e9 * device.memory_gb, together=device.node, near=1e9 * device.node_gbs, far=1e9 * device.network_gbs,
        watts=device.watts, low=device.usd_low, high=device.usd_high, price=device.price_source, **others,
    )  # fmt: skip


def efficiency_of(name: str) -> Efficiency:
    """Returns a device's efficiency: of this machine as measured, of others by published runs."""
    if name != HERE:
        return predict_efficiency(name)
    low, middle, high = read_calibration()["shares"]
    spread = max(math.log(high / middle), math.log(middle / low), 0.05)
    return Efficiency(math.log(middle), 0, 0, 0, spread, "training steps measured on this machine, slowest to fastest")


def read_calibration() -> dict[str, Any]:
    """Returns what `--calibrate` measured. Raises UserError when it has not, or when its file is damaged."""
    file = cache_root() / "plan" / "calibration.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if Accelerator(**saved["device"]).bf16_tflops > 0 and len([math.log(share) for share in saved["shares"]]) == 3:
            return saved
        raise ValueError
    except FileNotFoundError:
        raise UserError("This machine was not measured yet: python -m bench.plan --calibrate does, in about 30 s.") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{file} is damaged: measure again with python -m bench.plan --calibrate.") from None

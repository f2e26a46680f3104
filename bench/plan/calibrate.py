"""Measures this machine for the planner, in about 30 seconds: its peak, what training steps reach of it, its watts by RAPL."""

import contextlib
import dataclasses
from pathlib import Path

from bench.cli import Json, Shape, progress
from bench.plan.hardware import HERE
from engine.counting.accelerators import Accelerator
from engine.device import start_jax
from engine.files import cache_folder, write_json

_SHAPES = (Shape(4, 256, 256, 8), Shape(6, 384, 256, 8), Shape(6, 512, 256, 8))


def calibrate() -> Json:
    """Measures, saves in the user's cache what `--hardware here` reads, and returns it."""
    start_jax()
    from bench.models import make_step, make_step_inputs
    from bench.timing import measure
    from engine.counting.flops import train_flops
    from engine.counting.hardware import best_ceilings, clock, device_memory_bytes, measure_ceilings
    from engine.training.optimizer import OptimizerConfig, make_optimizer

    progress("measuring this machine's peak ...")
    ceilings, rates = measure_ceilings(), []
    joules, start = rapl_joules(), clock()
    for shape in _SHAPES:
        progress(f"training steps of {shape} ...")
        inputs = make_step_inputs(shape, "bfloat16")
        step = make_step(inputs, make_optimizer(OptimizerConfig(kind="adamw")))
        timing = measure({str(shape): step}, rounds=5, warmups=2)[str(shape)]
        flops = train_flops(inputs.cfg, shape.tokens, attention="causal").total
        rates.append(shape.batch * shape.tokens * flops / timing.median)
    watts = (rapl_joules() - joules) / (clock() - start)
    ceilings = best_ceilings(ceilings, measure_ceilings())
    device = Accelerator(
        HERE, ceilings.bf16_gflops / 1e3, device_memory_bytes() / 1e9, ceilings.read_gbs, 1, 0, 0, ceilings.int8_gflops / 1e3,
        watts, 0, 0, f"{ceilings.device}, {ceilings.cores} cores, measured",
    )  # fmt: skip
    shares = sorted(rate / 1e9 / ceilings.bf16_gflops for rate in rates)
    document = {"device": dataclasses.asdict(device), "shares": shares}
    write_json(cache_folder("plan") / "calibration.json", document)
    energy = (
        f"{watts:.0f} W by RAPL, of the processor alone" if watts else "RAPL cannot be read here, so give --watts for energy"
    )
    print(f"{device.source}: {ceilings.bf16_gflops:,.0f} GFLOP/s in bfloat16, {device.memory_gbs:.0f} GB/s")
    print(f"training steps reach {shares[0]:.0%} to {shares[-1]:.0%} of it; {energy}")
    return document


def rapl_joules(root: Path = Path("/sys/class/powercap")) -> float:
    """Returns the joules that the processor's packages have counted; 0 where the machine does not let them be read."""
    total = 0.0
    for file in root.glob("intel-rapl:?/energy_uj"):
        with contextlib.suppress(OSError, ValueError):
            total += int(file.read_text()) / 1e6
    return total

"""Plans a training step on a mesh that need not be here: another process compiles it for virtual devices."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import jax
import numpy as np

from engine.counting.accelerators import Accelerator
from engine.counting.xla import Collective, read_collectives, xla_peak
from engine.device import start_jax
from engine.errors import UserError
from engine.format import duration, format_bytes, si
from engine.mesh.layout import global_batch, make_mesh, sharded_shapes
from engine.mesh.shape import MeshShape
from engine.model.config import ModelConfig
from engine.model.transformer import init_params
from engine.planning.step import EFFICIENCY
from engine.text.batch import Batch
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state
from stages.cli.console import Console
from stages.runs.plan import Recipe, RunPlan
from stages.runs.step_program import compile_step

COMMAND = ("-m", __name__)  # of the process that compiles
COMPILE_SECONDS = 900.0  # at most


def plan_on_mesh(plan: RunPlan, device: Accelerator, console: Console) -> list[tuple[str, str]]:
    """Returns rows: bytes a device, collectives and seconds of a step. Raises UserError when it
    does not compile."""
    mesh = plan.mesh
    compiled = _compile_in_subprocess(plan, console)
    collectives = [
        Collective(kind, size, tuple(group), times) for kind, size, group, times in compiled["collectives"]
    ]
    seconds = plan.step.seconds_on(device, collectives)
    least = si(max(seconds.values()), "s")
    most = si(sum(seconds.values()), "s")
    parts = ", ".join(f"{name} {si(value, 's')}" for name, value in seconds.items())
    return [
        (
            "mesh",
            f"{mesh}: compiled for {mesh.devices} virtual devices "
            f"in {duration(compiled['seconds'])}, not run",
        ),
        ("holds", _describe_memory(plan, device, compiled["state"], compiled["temporaries"])),
        ("sends", _describe_collectives(plan, collectives)),
        ("takes", f"a step: {least} if all of this overlaps, {most} if nothing does: {parts}"),
        (
            "assumed",
            f"products at {EFFICIENCY:.0%} of {device.bf16_tflops:g} TFLOP/s, "
            f"memory at {device.memory_gbs:g} GB/s, "
            f"rings at {device.node_gbs:g} GB/s in a node of {device.node} "
            f"and {device.network_gbs:g} GB/s a device beyond, no latency; "
            "a CPU's program: more temporaries than others, and all-reduces where they reduce-scatter",
        ),
    ]


def _describe_memory(plan: RunPlan, device: Accelerator, state: int, temporaries: int) -> str:
    limit = 1e9 * device.memory_gb
    phrase = f"a device: {format_bytes(state)} of state, {format_bytes(temporaries)} of temporaries; "
    phrase += f"{device.name} has {format_bytes(limit)}"
    held = state + temporaries
    if held <= limit:
        return phrase
    enough = plan.mesh._replace(fsdp=plan.mesh.fsdp * 2 ** math.ceil(math.log2(held / limit)))
    remedies = f"about {enough}"
    if plan.recipe.accumulate * plan.mesh.row_shards < plan.recipe.batch:
        remedies += " or more --accumulate"
    if plan.cfg.remat == "none":
        remedies += " or --remat"
    return f"{phrase}  ** too little: {remedies} would fit **"


def _describe_collectives(plan: RunPlan, collectives: list[Collective]) -> str:
    times = Counter[str]()
    sizes = Counter[str]()
    for collective in collectives:
        times[collective.kind] += collective.times
        sizes[collective.kind] += collective.times * collective.bytes
    kinds = [f"{times[kind]:,} {kind} of {format_bytes(size)}" for kind, size in sizes.most_common()]
    sent = format_bytes(sum(collective.wire_bytes for collective in collectives))
    phrase = f"a device: {sent} a step, in {', '.join(kinds) or 'nothing'}"
    if plan.cfg.dtype == "bfloat16":
        phrase += "; bfloat16 counts as the 32 bits that a CPU sends, twice an accelerator's"
    return phrase


def _compile_in_subprocess(plan: RunPlan, console: Console) -> dict[str, Any]:
    mesh = plan.mesh
    cfg = plan.cfg.to_json() | {"scan": True}  # compiles one layer
    request = json.dumps((cfg, dataclasses.asdict(plan.recipe), mesh)).encode()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={mesh.devices}"
    with console.task(f"compiling for {mesh.devices} virtual devices", always=True):
        try:
            process = subprocess.run(
                [sys.executable, *COMMAND],
                input=request,
                capture_output=True,
                check=False,
                timeout=COMPILE_SECONDS,
                start_new_session=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},  # Ctrl-C is ours
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"Compiling for {mesh} took over {duration(COMPILE_SECONDS)} and was given up."
            ) from None
    if process.returncode:
        reason = (
            process.stderr.decode().strip().rpartition("\n")[2]
            or f"its process ended with {process.returncode}"
        )
        raise UserError(f"The step does not compile for {mesh}: {reason}")
    return json.loads(process.stdout)


def _end_after(parent: int) -> None:
    """Ends this process after its parent, which a signal may end at any moment."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def compile_for_parent() -> None:
    begin = time.monotonic()
    parent = os.getppid()
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    fields, recipe, mesh = json.load(sys.stdin)
    cfg = ModelConfig.from_json(fields)
    optimizer = OptimizerConfig(**recipe["optimizer"])
    plan = RunPlan("", cfg, Recipe(**recipe | {"optimizer": optimizer}), 0, None, None)
    start_jax("cpu")
    shape = plan.recipe.batch, plan.recipe.context
    tokens = np.zeros(shape, np.int32)
    counts = np.zeros(shape, bool)
    with jax.set_mesh(make_mesh(MeshShape(*mesh))):
        state = sharded_shapes(
            lambda: init_state(make_optimizer(optimizer), init_params(cfg, jax.random.key(0)))
        )
        program = compile_step(plan, state, {}, global_batch(Batch(tokens, tokens, counts, tokens)))
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    compiled = {
        "state": held,
        "temporaries": xla_peak(program) - held,
        "collectives": read_collectives(program.as_text() or ""),
    }
    print(json.dumps(compiled | {"seconds": time.monotonic() - begin}))


if __name__ == "__main__":
    compile_for_parent()

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
from typing import NamedTuple

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
from engine.training.step import TrainState, init_state
from stages.cli.console import Console
from stages.runs.plan import Recipe, RunPlan
from stages.runs.step_program import compile_step

COMMAND = ("-m", __name__)  # of the process that compiles
COMPILE_SECONDS = 900.0  # at most


class CompiledStep(NamedTuple):
    """A training step as another process compiled it."""

    state_bytes: int  # on a device
    temporary_bytes: int
    collectives: list[Collective]
    seconds: float  # to compile

    @classmethod
    def from_json(cls, text: bytes) -> "CompiledStep":
        record = json.loads(text)
        collectives = []
        for kind, size, group, times in record.pop("collectives"):
            collectives.append(Collective(kind, size, tuple(group), times))
        return cls(**record, collectives=collectives)


def plan_on_mesh(plan: RunPlan, device: Accelerator, console: Console) -> list[tuple[str, str]]:
    """Returns rows: bytes a device, collectives and seconds of a step. Raises UserError when it
    does not compile."""
    mesh = plan.mesh
    compiled = _compile_in_subprocess(plan, console)
    seconds = plan.step.seconds_on(device, compiled.collectives)
    least = si(max(seconds.values()), "s")
    most = si(sum(seconds.values()), "s")
    parts = ", ".join(f"{name} {si(value, 's')}" for name, value in seconds.items())
    return [
        (
            "mesh",
            f"{mesh}: compiled for {mesh.devices} virtual devices in {duration(compiled.seconds)}, not run",
        ),
        ("holds", _describe_memory(plan, device, compiled)),
        ("sends", _describe_collectives(plan, compiled.collectives)),
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


def _describe_memory(plan: RunPlan, device: Accelerator, compiled: CompiledStep) -> str:
    limit = 1e9 * device.memory_gb
    phrase = f"a device: {format_bytes(compiled.state_bytes)} of state, "
    phrase += f"{format_bytes(compiled.temporary_bytes)} of temporaries; "
    phrase += f"{device.name} has {format_bytes(limit)}"
    held = compiled.state_bytes + compiled.temporary_bytes
    if held <= limit:
        return phrase
    doublings = math.ceil(math.log2(held / limit))
    larger_mesh = plan.mesh._replace(fsdp=plan.mesh.fsdp * 2**doublings)
    remedies = f"about {larger_mesh}"
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


def _compile_in_subprocess(plan: RunPlan, console: Console) -> CompiledStep:
    mesh = plan.mesh
    request = {
        "cfg": plan.cfg.to_json() | {"scan": True},  # compiles one layer
        "recipe": dataclasses.asdict(plan.recipe),
        "mesh": mesh,
    }
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={mesh.devices}"
    with console.task(f"compiling for {mesh.devices} virtual devices", always=True):
        try:
            process = subprocess.run(
                [sys.executable, *COMMAND],
                input=json.dumps(request).encode(),
                capture_output=True,
                check=False,
                timeout=COMPILE_SECONDS,
                start_new_session=True,  # Ctrl-C is ours
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"Compiling for {mesh} took over {duration(COMPILE_SECONDS)} and was given up."
            ) from None
    if process.returncode:
        _, _, last_line = process.stderr.decode().strip().rpartition("\n")
        reason = last_line or f"its process ended with {process.returncode}"
        raise UserError(f"The step does not compile for {mesh}: {reason}")
    return CompiledStep.from_json(process.stdout)


def _end_after(parent: int) -> None:
    """Ends this process after its parent, which a signal may end at any moment."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def compile_for_parent() -> None:
    """Reads a request of `_compile_in_subprocess`, and prints the CompiledStep as JSON."""
    begin = time.monotonic()
    parent = os.getppid()
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    request = json.load(sys.stdin)
    optimizer = OptimizerConfig(**request["recipe"].pop("optimizer"))
    plan = RunPlan(
        name="",
        cfg=ModelConfig.from_json(request["cfg"]),
        recipe=Recipe(**request["recipe"], optimizer=optimizer),
        seed=0,
        steps=None,
        seconds=None,
    )
    start_jax("cpu")

    def begin_state() -> TrainState:
        return init_state(make_optimizer(optimizer), init_params(plan.cfg, jax.random.key(0)))

    shape = (plan.recipe.batch, plan.recipe.context)
    tokens = np.zeros(shape, np.int32)
    batch = Batch(tokens=tokens, targets=tokens, mask=np.zeros(shape, bool), positions=tokens)
    with jax.set_mesh(make_mesh(MeshShape(*request["mesh"]))):
        state = sharded_shapes(begin_state)
        program = compile_step(plan, state, {}, global_batch(batch))
    state_bytes = 0
    for leaf in jax.tree.leaves(state):
        state_bytes += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    compiled = CompiledStep(
        state_bytes=state_bytes,
        temporary_bytes=xla_peak(program) - state_bytes,
        collectives=read_collectives(program.as_text() or ""),
        seconds=time.monotonic() - begin,
    )
    print(json.dumps(compiled._asdict()))


if __name__ == "__main__":
    compile_for_parent()

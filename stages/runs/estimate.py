"""Estimates what a run takes of this machine: finds its ceilings, and the memory that a step may use."""

import dataclasses

import jax

from engine.counting.hardware import (
    RATES,
    Ceilings,
    device_memory_bytes,
    measure_apart,
    measure_ceilings,
    require_memory,
    save_ceilings,
    saved_ceilings,
)
from engine.format import format_bytes, format_count
from engine.mesh import processes
from engine.mesh.shape import ONE_DEVICE, MeshShape
from stages.cli.console import Console
from stages.runs.plan import RunPlan

PROCESS_BYTES = 400_000_000  # of Python and JAX
# Of a layer's programs, and of compiling them or reading them from the cache, whichever takes more.
LAYER_BYTES = 8_000_000
ADAPTED_LAYER_BYTES = 12_000_000  # with an adapter
SAMPLED_LAYER_BYTES = 18_000_000  # where completions are sampled between steps


def process_bytes(plan: RunPlan) -> int:
    """Returns the host memory beside the arrays: 0.4 GB were seen with 6 layers, 0.6 to 0.9 GB with 30."""
    layer_bytes = LAYER_BYTES
    if plan.step_name == "round":
        layer_bytes = SAMPLED_LAYER_BYTES
    elif plan.trainable and plan.trainable.adapted:
        layer_bytes = ADAPTED_LAYER_BYTES
    return PROCESS_BYTES + layer_bytes * plan.cfg.layers


def memory_limit(plan: RunPlan) -> int:
    """Returns the bytes for a step on a device: an accelerator's, or its share of the host's less
    what the processes take."""
    if jax.default_backend() != "cpu":
        return device_memory_bytes()
    count = processes.process_count() // processes.machine_count()
    sharing = min(plan.mesh.devices, count * jax.local_device_count())
    return max(device_memory_bytes() - count * process_bytes(plan), 0) // sharing


def require_room(plan: RunPlan, needed: int, what: str, remedy: str, detail: str = "") -> None:
    """Raises UserError when a step of the plan needs more bytes on a device than there are."""
    if plan.mesh.devices > 1:
        detail += f" on each of {plan.mesh.devices} devices"
    require_memory(needed, what, remedy, detail=detail, limit=memory_limit(plan))


def find_ceilings(console: Console) -> Ceilings:
    """Returns this machine's ceilings from the user's cache; or measures and saves them.

    On a CPU another process measures: its arrays are not this run's memory.
    """
    saved = saved_ceilings()
    if saved:
        return saved
    with console.task("measuring this machine's ceilings, once", always=True) as report:
        ceilings = None
        if jax.default_backend() == "cpu":
            ceilings = measure_apart()
        if ceilings is None:
            ceilings = measure_ceilings(report)
    return save_ceilings(ceilings)


def mesh_ceilings(ceilings: Ceilings, mesh: MeshShape) -> Ceilings:
    """Returns what all devices of a mesh reach together, of one's `ceilings`; a machine's CPUs
    share its cores."""
    count = mesh.devices
    if jax.default_backend() == "cpu":
        count = processes.machine_count()
    return dataclasses.replace(ceilings, **{rate: count * getattr(ceilings, rate) for rate in RATES})


def memory_estimate(plan: RunPlan, needed: int) -> str:
    limit = f"{format_bytes(memory_limit(plan))} that are left for a {plan.step_name}"
    if plan.mesh.devices > 1:
        limit += f" on each device of {plan.mesh}"
    saved = dataclasses.replace(plan, mesh=ONE_DEVICE).memory.saved // processes.process_count()
    phrase = f"about {format_bytes(needed)} of {limit}; "
    phrase += f"{format_bytes(saved)} more of host memory, if free, to save beside training"
    if jax.default_backend() == "cpu" and plan.mesh.devices == 1:
        peak = max(needed + saved, plan.step.answering_bytes) + process_bytes(plan)
        phrase += f"; {format_count(peak)}B in all with Python and JAX"
    return phrase

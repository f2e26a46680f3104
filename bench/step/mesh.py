"""Times a training step on a mesh of virtual devices in turns with the same step on one device, on the same cores.

Virtual devices share the processor's cores, so a ratio above 1 is what the mesh itself costs: collectives, smaller products,
and work that every device does.
"""

from typing import Any, Literal

import jax
import numpy as np

from bench.cli import Json, Shape, print_table, progress
from bench.models import make_step_inputs
from bench.timing import describe_noise, measure, ratio
from engine.counting.collectives import read_collectives
from engine.mesh.layout import global_batch, group_columns, init_sharded, make_mesh, sharded_shapes, ungroup_columns
from engine.mesh.shape import check_mesh, parse_mesh
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state, train_step


def measure_mesh(
    mesh: str, shape: Shape, optimizer: Literal["adamw", "muon"], dtype: Literal["bfloat16", "float32"], rounds: int
) -> Json:
    """Times the steps, compares losses and weights after them, counts the bytes that the compiled step exchanges; prints the
    comparison and returns the document. Raises UserError for a mesh that does not fit."""
    size, inputs, tx = parse_mesh(mesh), make_step_inputs(shape, dtype), make_optimizer(OptimizerConfig(kind=optimizer))
    check_mesh(size, inputs.cfg, shape.batch)
    batch, progress_share = jax.device_get(inputs.batch), np.float32(0.5)
    states: dict[str, Any] = {}
    compiled: dict[str, str] = {}
    losses: dict[str, list[float]] = {"one device": [], str(size): []}

    def make_step(name: str) -> Any:
        begin = jax.jit(lambda: group_columns(inputs.cfg, init_state(tx, inputs.params)))
        rows = global_batch(batch)
        program = train_step.lower(inputs.cfg, tx, sharded_shapes(begin), {}, rows, progress_share).compile()
        states[name], compiled[name] = init_sharded(begin), program.as_text() or ""

        def step() -> Any:
            states[name], metrics = program(states[name], {}, rows, progress_share)
            losses[name].append(float(metrics.loss))
            return metrics.loss

        return step

    progress(f"compiling and measuring {shape} on one device and on {size} ...")
    steps = {"one device": make_step("one device")}
    with jax.set_mesh(make_mesh(size)):
        steps[str(size)] = make_step(str(size))
        timings = measure(steps, rounds=rounds, warmups=2)
        sharded = jax.device_get(ungroup_columns(inputs.cfg, states[str(size)].trainable))
    one, many = timings.values()
    over = ratio(many, one)
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses.values()))
    whole = jax.device_get(states["one device"].trainable)
    moved = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole)))
    exchanged = sum(one.bytes * one.times for one in read_collectives(compiled[str(size)]))
    print_table(str(shape), ("", "ms a step"), [(timing.name, f"{timing.median * 1e3:.1f}") for timing in (one, many)])
    print(f"{size} takes {over} of the time of one device; losses differ by {apart:.1e} of themselves, weights by {moved:.1e}")
    print(f"collectives: {exchanged / 1e6:.2f} MB a step on a device")
    print(describe_noise(timings))
    return {
        "mesh": size._asdict(), "shape": str(shape), "optimizer": optimizer, "dtype": dtype,
        "ms_per_step": {timing.name: timing.median * 1e3 for timing in (one, many)}, **over.fields(),
        "collective_bytes": exchanged, "loss_difference": apart, "weight_difference": moved,
    }  # fmt: skip

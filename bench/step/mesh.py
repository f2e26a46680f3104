"""Compares a training step on a mesh of virtual devices with the same step on one device, on the same cores.

    python -m bench.sharding                        fsdp=2 beside one device, in one run
    python -m bench.sharding --mesh tensor=2        or data=2, or data=2,fsdp=2: a device for each place of the mesh

Virtual devices share the processor's cores, so a ratio above 1 is what the mesh itself costs: collectives, smaller products,
and work that every device does. Losses and weights after the same steps are compared as well, and the bytes
that the compiled step exchanges with those of the formula. The model reads bytes.
"""

import dataclasses
import os
import sys
from typing import Any, Literal

from bench.cli import Json, check_rounds, parse_shape, progress, run_bench
from engine.device import start_jax


@dataclasses.dataclass(frozen=True)
class ShardingFlags:
    mesh: str = "fsdp=2"
    shape: str = "6x384x256x16"
    """LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rounds: int = 9
    """Interleaved rounds; the median counts."""


def measure_sharding(flags: ShardingFlags) -> Json:
    """Measures steps on one device and on the mesh; prints the comparison and returns the document."""
    shape = parse_shape("--shape", flags.shape)
    check_rounds(flags.rounds)
    from engine.mesh_shape import check_mesh, parse_mesh
    from engine.placement import make_mesh

    size = parse_mesh(flags.mesh)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={size.devices}"
    start_jax("cpu")
    import jax
    import numpy as np

    from bench.models import make_step_inputs
    from bench.timing import describe_noise, measure, ratio
    from engine.counting.collectives import read_collectives
    from engine.counting.mesh_traffic import step_collectives
    from engine.placement import global_batch, init_sharded, sharded_shapes
    from engine.sharding import group_columns, ungroup_columns
    from engine.training.optimizer import OptimizerConfig, make_optimizer
    from engine.training.step import init_state, train_step

    inputs, tx = make_step_inputs(shape, flags.dtype), make_optimizer(OptimizerConfig(kind=flags.optimizer))
    check_mesh(size, inputs.cfg, shape.batch)
    mesh, batch, progress_share = make_mesh(size), jax.device_get(inputs.batch), np.float32(0.5)
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
    with jax.set_mesh(mesh):
        steps[str(size)] = make_step(str(size))
        weights = lambda name: states[name].trainable
        timings = measure(steps, rounds=flags.rounds, warmups=2)
        sharded = jax.device_get(ungroup_columns(inputs.cfg, weights(str(size))))
    one, many = timings.values()
    quotient = ratio(many, one)
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses.values()))
    whole = jax.device_get(weights("one device"))
    moved = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole)))
    exchanged = sum(one.bytes * one.times for one in read_collectives(compiled[str(size)]))
    formula = step_collectives(inputs.cfg, size, shape.batch, shape.tokens, flags.optimizer).total()
    print(f"{'':>16} {'ms a step':>10}")
    for timing in timings.values():
        print(f"{timing.name:>16} {timing.median * 1e3:10.1f}")
    print(
        f"{size} takes {quotient} of the time of one device; losses differ by {apart:.1e} of themselves, weights by {moved:.1e}"
    )
    print(f"collectives: {exchanged / 1e6:.2f} MB a step on a device, {formula / 1e6:.2f} by formula")
    print(describe_noise(timings))
    return {
        "mesh": size._asdict(), "shape": str(shape), "optimizer": flags.optimizer, "dtype": flags.dtype,
        "ms_per_step": {timing.name: timing.median * 1e3 for timing in timings.values()}, **quotient.fields(),
        "collective_bytes": exchanged, "formula_bytes": formula, "loss_difference": apart, "weight_difference": moved,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_bench("bench.sharding", __doc__, ShardingFlags, measure_sharding))

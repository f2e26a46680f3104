"""The devices and processes of a run: the mesh of `--mesh`, what lies on it, and who must agree."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engine.counting.hardware import device_memory_bytes
from engine.device import Device
from engine.errors import UserError
from engine.mesh import processes
from engine.mesh.layout import make_mesh, shardings
from engine.mesh.shape import MeshShape
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths

PER_PROCESS_ENTRIES = ("command", "device")  # of run.json, in which processes may differ


def make_mesh_here(shape: MeshShape) -> Mesh:
    """As `make_mesh`, of all devices, connected; on a CPU its UserError says how to have virtual
    ones."""
    try:
        return connect_devices(make_mesh(shape))
    except UserError as error:
        if jax.default_backend() != "cpu" or processes.process_count() > 1:
            raise
        virtual = f"XLA_FLAGS=--xla_force_host_platform_device_count={shape.devices}"
        raise UserError(
            f"{error} To try this mesh on a CPU, set {virtual}: virtual devices, which share its cores."
        ) from None


def connect_devices(mesh: Mesh) -> Mesh:
    """Connects each group of devices that collectives of the mesh can join, and returns the mesh.

    Gloo connects a group at its first collective, and gives up after 30 s, too early where one
    process compiles longer than another: so the processes meet once each has compiled this. In a
    connected group a collective waited 45 s without error.
    """
    if processes.process_count() == 1:
        return mesh
    names = mesh.axis_names
    axes = range(len(names))
    groups: list[tuple[int, ...]] = []  # axes that a sum goes over
    for size in range(1, len(axes) + 1):
        groups += itertools.combinations(axes, size)
    results = []
    for group in groups:
        others = [names[axis] for axis in axes if axis not in group]
        results.append(NamedSharding(mesh, PartitionSpec(*others)))
    ones = np.ones(mesh.devices.shape, np.float32)
    over_all = NamedSharding(mesh, PartitionSpec(*names))
    numbers = jax.make_array_from_callback(ones.shape, over_all, ones.__getitem__)
    program = jax.jit(lambda numbers: [numbers.sum(group) for group in groups], out_shardings=results)
    compiled = program.lower(numbers).compile()
    processes.refuse_differences({"--mesh": str(MeshShape(**mesh.shape))})
    jax.block_until_ready(compiled(numbers))
    return mesh


def device_with_mesh(device: Device, shape: MeshShape) -> Device:
    in_processes = ""
    if processes.process_count() > 1:
        in_processes = f" in {processes.process_count()} processes"
    return dataclasses.replace(device, mesh=f"{shape.devices} devices{in_processes}, {shape}")


def refuse_different_runs(metadata: dict[str, Any], cfg: ModelConfig, options: Any, step: int) -> None:
    """Raises UserError in every process when their run.json, architecture, options or checkpoints
    differ."""
    shared = {name: value for name, value in metadata.items() if name not in PER_PROCESS_ENTRIES}
    shared |= {"config": cfg.to_json(), "options": options, "newest checkpoint": step}
    processes.refuse_differences({name: str(value) for name, value in leaf_paths(shared).items()})


def fits_one_device(tree: Any) -> bool:
    """Whether every process has room for parameters whole on each of its devices, and once more in
    half as many bytes."""
    if shardings(tree) is None:
        return True
    device = jax.local_devices()[0]
    copies = 1
    if device.platform == "cpu":  # the devices of a machine share its memory
        copies = jax.device_count() // processes.machine_count()
    statistics = device.memory_stats() or {}
    free = device_memory_bytes() - statistics.get("bytes_in_use", 0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    fits = 1.5 * copies * size <= free
    return all(process_fits for [process_fits] in processes.gather_numbers(fits))


@contextlib.contextmanager
def on_one_device(tree: Any) -> Iterator[Any]:
    """Gives parameters whole, on one device of each process, and lets the block compute there.

    All processes must come here; in the block each is for itself.
    """
    if shardings(tree) is None:
        yield tree
        return
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    with jax.set_mesh(make_mesh(MeshShape(), jax.local_devices()[:1])):
        yield jax.tree.map(lambda x: x.addressable_data(0), whole)

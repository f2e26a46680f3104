"""Makes meshes of devices, and lays weights, moments, batches and caches out over the mesh of `jax.set_mesh`.

    with jax.set_mesh(make_mesh(parse_mesh("data=2,fsdp=4"))):
        state = init_sharded(begin)                  # begin() -> TrainState; each device makes its own part
        batch = global_batch(batches.at(step))       # of each process's own rows
        state, metrics = train_step(cfg, tx, state, {}, batch, progress)      # XLA adds the collectives

`sharding.py` says which axes cut what. Without a mesh every function here returns what it was given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from engine.errors import UserError
from engine.mesh.layout import cache_spec, column_shards, group_columns, map_specs, pin_cache
from engine.mesh.shape import AXES, ROWS, MeshShape, check_mesh, parse_mesh
from engine.model.column_groups import file_order, regroup
from engine.model.config import ModelConfig


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices, by default all of JAX's. Raises UserError when they are not as many as the shape has."""
    devices = jax.devices() if devices is None else devices
    if shape.devices != len(devices):
        raise UserError(
            f"The mesh {shape} is {shape.devices} devices and there are {len(devices)}: the product of {', '.join(AXES)} must "
            f"be {len(devices)}, for example fsdp={len(devices)}."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def make_inference_mesh(text: str | None) -> Mesh | None:
    """Reads `tensor=2` and returns the mesh of the first devices; None for None. Raises UserError.

    Inference reads all weights for every token, so it does not gather them: `tensor` alone cuts them.
    """
    if text is None:
        return None
    shape = parse_mesh(text)
    if shape.row_shards > 1 or shape.devices > jax.device_count():
        most = f"up to tensor={jax.device_count()} as there are {jax.device_count()} devices"
        raise UserError(f"Inference cuts a model along tensor alone, {most}, not by {shape}.")
    return make_mesh(shape, jax.devices()[: shape.devices])


def check_inference(cfg: ModelConfig, mesh: Mesh | None) -> None:
    """Raises UserError when the mesh, if any, cannot cut the model."""
    if mesh is not None:
        check_mesh(shape := MeshShape(**mesh.shape), cfg, batch=shape.row_shards)


def current_mesh() -> Mesh | None:
    """Returns the mesh of this thread, to `jax.set_mesh` in another; None without one, which `set_mesh` takes too."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def shardings(tree: Any) -> Any:
    """Returns a tree like `tree` (of arrays or shapes) of NamedShardings, or None without a mesh.

    A moment lies as its parameter does, for optax keeps it in a tree with the parameter's own path.
    """
    mesh = current_mesh()
    return mesh and map_specs(lambda spec, _: NamedSharding(mesh, spec), tree, mesh.shape)


def sharded_shapes(begin: Callable[[], Any]) -> Any:
    """Returns the shapes, with shardings, of what `begin` makes: to lower a step for, or to load a checkpoint into."""
    shapes = jax.eval_shape(begin)
    return shapes if (wanted := shardings(shapes)) is None else _shapes_on(shapes, wanted)


def _shapes_on(tree: Any, wheres: Any) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, wheres)


def make_sharded_cache(make: Callable[[], Any]) -> Any:
    """Returns `make()`, a KV cache, on a mesh laid out as `pin_cache` does, each device making its own part."""
    return make() if current_mesh() is None else jax.jit(lambda: pin_cache(make()))()


def inference_shapes(params: Any, state: Any) -> tuple[Any, Any]:
    """Returns the shapes of parameters and of KV caches, with where they lie: on the mesh, or on the first device."""
    mesh = current_mesh()
    if mesh is None:
        wheres = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), (params, state))
    else:
        wheres = shardings(params), jax.tree.map(lambda x: NamedSharding(mesh, cache_spec(x.shape, mesh.shape)), state)
    return _shapes_on((params, state), wheres)


def init_sharded(begin: Callable[..., Any], *args: Any) -> Any:
    """Returns `begin(*args)`; on a mesh each device computes its own part: random numbers are those of one device.

    Matrices come with their columns grouped, see `group_columns`.
    """
    if current_mesh() is None:
        return begin(*args)
    return jax.jit(begin, out_shardings=shardings(jax.eval_shape(begin, *args)))(*args)


def place(cfg: ModelConfig, params: Any) -> Any:
    """Lays parameters, ordered as in files, out over the mesh. Each device reads its own part; NumPy may be memory-mapped.

    To load a model that no single device holds, do so in `device.host_memory`.
    """
    mesh = current_mesh()
    if mesh is None:
        return params
    wanted = jax.eval_shape(lambda tree: group_columns(cfg, tree), params)

    def read(x: Any, order: Any = None) -> Callable[[Any], np.ndarray]:
        whole = np.asarray(x)  # no copy of an array in the host's memory, which JAX would send to every device to index it
        return lambda index: whole[index] if order is None else whole[index[:-1]][..., order[index[-1]]]

    readers = regroup(cfg, params, lambda x, widths: read(x, file_order(widths, column_shards())), column_shards())
    make = lambda leaf, where, part: jax.make_array_from_callback(
        leaf.shape, where, part if callable(part) else read(part), dtype=leaf.dtype
    )
    return jax.tree.map(make, wanted, shardings(wanted), readers)


def batch_share(rows: int) -> tuple[int, int]:
    """Returns (shares, share): into how many a batch of `rows` is cut, and which of them this process reads.

    Along `data` and `fsdp` processes share the rows, along `tensor` all read the same. Raises UserError when the rows of
    this process do not lie side by side.
    """
    mesh = current_mesh()
    if mesh is None:
        return 1, 0
    index = NamedSharding(mesh, P(ROWS)).devices_indices_map((rows,))
    ranges = sorted({index[device][0].indices(rows)[:2] for device in mesh.local_devices})
    count = sum(stop - start for start, stop in ranges)
    if ranges[-1][1] - ranges[0][0] != count or ranges[0][0] % count:
        raise UserError("The rows of this process do not lie side by side: let tensor divide the devices of each process.")
    return rows // count, ranges[0][0] // count


def global_batch(batch: Any) -> Any:
    """Returns a batch over all devices, from this process's own rows of it (NumPy)."""
    mesh = current_mesh()
    if mesh is None:
        return batch
    where, processes = NamedSharding(mesh, P(ROWS)), batch_share(MeshShape(**mesh.shape).row_shards)[0]
    place = lambda x: jax.make_array_from_process_local_data(where, np.asarray(x), (x.shape[0] * processes, *x.shape[1:]))
    return jax.tree.map(place, batch)

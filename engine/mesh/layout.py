"""Lays weights, moments, batches and caches out over the mesh of `jax.set_mesh`; pins arrays in programs.

    with jax.set_mesh(make_mesh(parse_mesh("data=2,fsdp=4"))):
        state = init_sharded(begin)                  # begin() -> TrainState; each device makes its own part
        batch = global_batch(batches.at(step))       # of each process's own rows
        state, metrics = train_step(cfg, tx, state, {}, batch, progress)      # XLA adds the collectives

`rules.py` says which axes cut an array. Without a mesh nothing here adds to a program: functions
return their arguments, or call what they are given, and count 1 device.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from engine.errors import UserError
from engine.mesh.rules import cache_specs, fitting_spec, leaf_specs, tensor_alone
from engine.mesh.shape import AXES, ROWS, MeshShape, check_mesh, parse_mesh
from engine.model.config import ModelConfig

Specs = Callable[[Any, Any], Any]  # (a tree, axis -> devices) -> the axes that cut each leaf


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices, by default all of JAX's. Raises UserError when they are not as many as
    the shape has.
    """
    if devices is None:
        devices = jax.devices()
    if shape.devices != len(devices):
        raise UserError(
            f"The mesh {shape} is {shape.devices} devices and there are {len(devices)}: "
            f"the product of {', '.join(AXES)} must be {len(devices)}, for example fsdp={len(devices)}."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def make_inference_mesh(text: str | None) -> Mesh | None:
    """Reads `tensor=2` and returns the mesh of the first devices; None for None. Raises UserError.

    Inference reads all weights for every token, so `tensor` alone cuts them: nothing is gathered.
    """
    if text is None:
        return None
    shape = parse_mesh(text)
    if shape.row_shards > 1 or shape.devices > jax.device_count():
        most = f"up to tensor={jax.device_count()} as there are {jax.device_count()} devices"
        raise UserError(f"Inference cuts a model along tensor alone, {most}, not by {shape}.")
    return make_mesh(shape, jax.devices()[: shape.devices])


def check_inference(cfg: ModelConfig, mesh: Mesh | None) -> None:
    """Raises UserError when a mesh does not divide a model."""
    if mesh is not None:
        shape = MeshShape(**mesh.shape)
        check_mesh(shape, cfg, batch=shape.row_shards)


def current_mesh() -> Mesh | None:
    """Returns the mesh of this thread, to `jax.set_mesh` in another; None without one, which
    `set_mesh` takes too.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return None
    return mesh


def shardings(tree: Any, specs: Specs = leaf_specs) -> Any:
    """Returns a tree like `tree` (of arrays or shapes) of NamedShardings, or None without a mesh.

    A moment lies as its parameter does, for optax keeps it in a tree with the parameter's own path.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs(tree, mesh.shape))


def sharded_shapes(begin: Callable[..., Any], *like: Any) -> Any:
    """Returns the shapes, with shardings, of what `begin` makes: to lower a step for, or to load a
    checkpoint into.
    """
    shapes = jax.eval_shape(begin, *like)
    if current_mesh() is None:
        return shapes
    return _shapes_on(shapes, shardings(shapes))


def _shapes_on(tree: Any, tree_of_shardings: Any) -> Any:
    def shape_on(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape_on, tree, tree_of_shardings)


def make_sharded_cache(make: Callable[[], Any]) -> Any:
    """Returns `make()`, a KV cache; on a mesh each device makes its own part."""
    if current_mesh() is None:
        return make()

    def make_pinned() -> Any:
        return pin_cache(make())

    return jax.jit(make_pinned)()


def own_device() -> jax.Device:
    """Returns the device on which this process computes without a mesh: that of
    `jax.default_device`, or its first.
    """
    chosen = jax.config.jax_default_device
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.local_devices()[0]


def inference_shapes(params: Any, state: Any) -> tuple[Any, Any]:
    """Returns the shapes of parameters and of KV caches, with shardings on the mesh or this
    process's device.
    """
    tree = (params, state)
    if current_mesh() is None:
        alone = SingleDeviceSharding(own_device())
        return _shapes_on(tree, jax.tree.map(lambda _: alone, tree))
    return _shapes_on(tree, (shardings(params), shardings(state, cache_specs)))


def init_sharded(begin: Callable[..., Any], *args: Any) -> Any:
    """Returns `begin(*args)`; on a mesh each device computes its own part: random numbers are those
    of one device.
    """
    if current_mesh() is None:
        return begin(*args)
    out_shardings = shardings(jax.eval_shape(begin, *args))
    return jax.jit(begin, out_shardings=out_shardings)(*args)


def place(params: Any) -> Any:
    """Lays parameters out over the mesh; each device reads its own part. Large models come from
    `device.host_memory`.
    """
    if current_mesh() is None:
        return params

    def read(x: Any, where: NamedSharding) -> Array:
        # no copy of an array in the host's memory, which JAX would send to every device to index it
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, where, whole.__getitem__)

    return jax.tree.map(read, params, shardings(params))


def batch_share(rows: int) -> tuple[int, int]:
    """Returns (shares, share): into how many a batch of `rows` is cut, and which of them this
    process reads.

    Along `tensor` all processes read the same. Raises UserError when the rows of this process do
    not lie side by side.
    """
    mesh = current_mesh()
    if mesh is None:
        return 1, 0
    index = NamedSharding(mesh, P(ROWS)).devices_indices_map((rows,))
    ranges = sorted({index[device][0].indices(rows)[:2] for device in mesh.local_devices})
    count = sum(stop - start for start, stop in ranges)
    first = ranges[0][0]
    end = ranges[-1][1]
    if end - first != count or first % count:
        raise UserError(
            "The rows of this process do not lie side by side: let tensor divide the devices of each process."
        )
    return rows // count, first // count


def global_batch(batch: Any) -> Any:
    """Returns a batch over all devices, from this process's own rows of it (NumPy)."""
    mesh = current_mesh()
    if mesh is None:
        return batch
    where = NamedSharding(mesh, P(ROWS))

    def join_parts(x: Any) -> Array:
        return jax.make_array_from_process_local_data(where, np.asarray(x))

    return jax.tree.map(join_parts, batch)


# Inside a program: on the mesh it is traced for. To pin is `with_sharding_constraint`.


def pin(tree: Any, specs: Specs = leaf_specs) -> Any:
    """Pins parameters, gradients or a whole state where the rules say."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, specs(tree, mesh.shape))


def pin_cache(tree: Any) -> Any:
    return pin(tree, cache_specs)


def _no_axes(tree: Any, sizes: Mapping[str, int]) -> P:
    return P()


def replicate(tree: Any) -> Any:
    return pin(tree, _no_axes)


def _size(*axes: str) -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def row_shards() -> int:
    return _size(*ROWS)


def column_shards() -> int:
    return _size("tensor")


def _pin(x: Array, *axes: Any) -> Array:
    return pin(x, lambda x, sizes: fitting_spec(P(*axes), x.shape, sizes))


def shard_rows(x: Array) -> Array:
    """Pins x (B, ...): its rows over the devices, all else whole.

    Else XLA would let a weight's own cut spread into the activations: 35 times the traffic.
    """
    return _pin(x, ROWS)


def look_up(f: Callable[[Any, Array], Array], table: Any, tokens: Array) -> Array:
    """Returns f(table, tokens (B, T)) (B, T, D) pinned by `shard_rows`. Devices exchange results,
    and no table.
    """
    x = _pin(f(table, _pin(tokens, "data")), "data", None, ("tensor", "fsdp"))
    return shard_rows(_pin(x, ROWS, None, "tensor"))


def spread_rows(x: Array) -> Array:
    """Pins x (B, ...) with its rows over all devices, where they divide them: for a head, which no
    axis cuts.
    """
    if spread_shards(len(x)) == _size(*AXES):
        return _pin(x, AXES)
    return shard_rows(x)


def spread_shards(count: int) -> int:
    """Returns the number of devices that `spread_rows` cuts `count` rows for."""
    if count % _size(*AXES) == 0:
        return _size(*AXES)
    return row_shards()


def shard_columns(x: Array) -> Array:
    """Pins x (B, ..., F): its rows over the devices, its last axis over `tensor`."""
    return _pin(x, ROWS, *(None,) * (x.ndim - 2), "tensor")


def attend_by_head(
    kernel: Callable[..., Array | None], q: Array, k: Array, v: Array, mask: Array | None
) -> Array | None:
    """Returns kernel(q (B, T, N, H), k, v (B, S, K, H), mask (B, ...) or None) (B, T, N, H), each
    device its own rows and heads: XLA cannot cut a kernel.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v, mask)
    rows = ROWS if len(q) % row_shards() == 0 else None
    columns = "tensor" if k.shape[2] % column_shards() == 0 else None
    heads = P(rows, None, columns)
    # Unchecked, for a kernel does not say over which axes its results differ.
    return jax.shard_map(kernel, in_specs=(heads, heads, heads, P(rows)), out_specs=heads, check_vma=False)(
        q, k, v, mask
    )


def regather(weights: Any, *others: Any) -> tuple[Any, ...]:
    """Returns the trees unchanged; XLA gathers the weights anew for backward, and need not keep
    what forward gathered.

    Held by tests/training/test_sharding.py: without the barrier a step gathers half as much.
    """
    if _size("fsdp") == 1:
        return (weights, *others)
    return jax.lax.optimization_barrier((weights, *others))


def stack_rows(x: Array, parts: int) -> Array:
    """x (B, ...) -> (parts, B / parts, ...), each of rows from every device."""
    groups = row_groups(len(x) // parts)
    if groups == 1:
        return x.reshape(parts, -1, *x.shape[1:])
    grouped = x.reshape(groups, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return grouped.reshape(parts, -1, *x.shape[1:])


def row_groups(rows: int) -> int:
    """Returns the number of devices that share `rows` rows: 1 for a few rows, which every device holds."""
    if rows % row_shards() == 0:
        return row_shards()
    return 1


def cut_rows(x: Array, start: int, size: int) -> Array:
    """Returns rows start..start + size of x (M, ...), or of every device's share of x as
    `spread_rows` cuts it.
    """
    groups = spread_shards(len(x))
    if groups == 1:
        return x[start : start + size]
    return x.reshape(groups, -1, *x.shape[1:])[:, start : start + size].reshape(-1, *x.shape[1:])


def join(parts: Sequence[Array], groups: int, axis: int = 0) -> Array:
    """Joins parts along an axis, each with the shares of `groups` devices in turn: along 0 the
    inverse of `stack_rows`.
    """
    before = parts[0].shape[:axis]
    after = parts[0].shape[axis + 1 :]
    grouped = [x.reshape(*before, groups, -1, *after) for x in parts]
    return jnp.concatenate(grouped, axis=axis + 1).reshape(*before, -1, *after)


def map_whole_matrices(f: Callable[[Array], Array], tree: Any) -> Any:
    """Returns a tree of f(matrix), each computed whole by one device; f returns a matrix of the
    same shape.

    Matrices of one shape and place are stacked and exchanged, as many to every device (some may get
    zeros), first along `fsdp`, then along `tensor`; then back.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.tree.map(f, tree)
    leaves, treedef = jax.tree.flatten(tree)
    specs = jax.tree.leaves(leaf_specs(tree, mesh.shape))
    indices_by_kind: dict[Any, list[int]] = {}
    for index, (leaf, spec) in enumerate(zip(leaves, specs)):
        indices_by_kind.setdefault((leaf.shape, spec), []).append(index)
    results: dict[int, Array] = {}
    for (_, spec), indices in indices_by_kind.items():
        stack = jnp.stack([leaves[index] for index in indices])
        stack = jnp.pad(stack, ((0, -len(indices) % mesh.size), (0, 0), (0, 0)))
        results |= zip(indices, _map_stack(f, stack, spec))
    return jax.tree.unflatten(treedef, [results[index] for index in range(len(leaves))])


def _map_stack(f: Callable[[Array], Array], stack: Array, spec: P) -> Array:
    """Returns f of each matrix of a stack, as many as a multiple of the devices, which `spec` cuts."""
    # in which the matrices are dealt out; `data` has them all already
    order = ("fsdp", "tensor", "data")
    steps = [P(None, *spec), P("fsdp", *tensor_alone(spec)), P(order[:2])]
    own_share = functools.partial(jax.lax.map, f)
    f_of_each = jax.shard_map(own_share, in_specs=P(order), out_specs=P(order), check_vma=False)
    for step in steps:
        stack = jax.lax.with_sharding_constraint(stack, step)
    stack = f_of_each(stack)
    for step in reversed(steps):
        stack = jax.lax.with_sharding_constraint(stack, step)
    return stack

"""Writes, reads back and loads the arrays of a checkpoint. No other file uses Orbax.

Each of several processes writes, compares and reads its own parts of an array.
"""

import concurrent.futures
import errno
import itertools
import logging
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from engine.errors import UserError
from engine.mesh import processes
from engine.storage.digest import leaves_by_path
from engine.storage.untrusted import read_json_object

MAX_METADATA_BYTES = 64 * 2**20
GROUP_BYTES = 2**28  # of arrays that are read at once
TOPIC = "save"  # a thread's own, see `gather_strings`
INNER = "orbax"  # Orbax wants to make the folder itself


def check_leaves(part: str, tree: Any) -> Any:
    """Returns `tree` with NumPy scalars as 0-d arrays; raises for a leaf that Orbax would lose."""
    names: dict[str, str] = {}
    for path, leaf in leaves_by_path(tree).items():
        name = f"{part}/{'/'.join(path)}"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"save: {name} is a {type(leaf).__name__}, not an array.")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"save: {name} is a PRNG key; save its jax.random.key_data.")
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise TypeError(f"save: {name} is {leaf.dtype}, of which JAX would keep 32 bits when it is loaded.")
        if leaf.size == 0:
            raise ValueError(f"save: {name} has shape {leaf.shape}; Orbax cannot save an array without elements.")
        # Orbax joins names with dots, and overwrites equal ones in silence.
        if (other := names.setdefault(".".join(path), name)) != name:
            raise ValueError(f"save: {other} and {name} would have one name on disk.")
    # Orbax takes an array of one of several processes for a mistake; process 0 writes NumPy's.
    is_local = lambda leaf: isinstance(leaf, np.generic) or (processes.process_count() > 1 and not is_shared(leaf))
    return jax.tree.map(lambda leaf: np.asarray(leaf) if is_local(leaf) else leaf, tree)


def import_orbax() -> None:
    """Imports Orbax, which takes half a second, before it is needed."""
    from orbax.checkpoint import v1  # noqa: F401


def _run_orbax[T](work: Callable[[ModuleType], T]) -> T:
    """Runs `work(ocp)` with Orbax under our options; imported only now: 0.4 s.

    In a thread: Ctrl-C in the middle of Orbax would leave closed event loops with callbacks still to come, and tracebacks.
    """

    def run() -> T:
        from orbax.checkpoint import v1 as ocp

        context = ocp.Context()
        context.array.saving.use_compression = False  # weights do not compress: zstd doubles the time and saves 8%
        context.asynchronous.create_directories_asynchronously = False  # one that fails is noticed after twenty minutes
        context.memory.deepcopy_host_arrays = False  # nobody changes an array while we wait
        for logger in ("absl", "asyncio"):  # Orbax raises each error that it logs, and one of several that fail side by side
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        report = sys.unraisablehook
        # After an error, which is raised, TensorStore still calls into event loops that Orbax has closed.
        sys.unraisablehook = lambda error: None if str(error.exc_value) == "Event loop is closed" else report(error)
        with context:
            result = work(ocp)
        sys.unraisablehook = report
        return result

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def begin_write(building: Path, trees: dict[str, Any]) -> Any:
    """Begins to write the arrays of several processes; returns Orbax's response, or None with one process."""
    if processes.process_count() == 1 or not trees:
        return None
    return _run_orbax(lambda ocp: ocp.save_checkpointables_async(building / INNER, trees))


def write(building: Path, trees: dict[str, Any], begun: Any = None) -> None:
    """Writes the arrays, or waits until those are written that `begin_write` has begun."""
    inner = building / INNER
    if trees:
        _run_orbax(lambda ocp: begun.result() if begun else ocp.save_checkpointables(inner, trees))
        if not processes.is_first():
            return
        (inner / "commit_success.txt").unlink(missing_ok=True)  # says only where it was built
        for entry in [*inner.iterdir()]:
            entry.rename(building / entry.name)
        inner.rmdir()


def compare(building: Path, trees: dict[str, Any]) -> None:
    """Reads the arrays back, in groups, and raises OSError for one that has other bits than in memory.

    Each of several processes compares its own parts; all wait for process 0 before, and for one another after.
    """
    processes.gather_strings(topic=TOPIC)
    for part, tree in trees.items():
        leaves = jax.tree.leaves(tree)
        for group in _in_groups(jax.tree.map(lambda leaf: (_as_abstract if is_shared(leaf) else _on_host)(leaf), tree)):
            try:
                read = _run_orbax(operator.methodcaller("load", building, group, checkpointable_name=part))
            except ValueError as error:
                raise OSError(errno.EIO, f"{part} cannot be read back") from error
            for leaf, back in zip(leaves, jax.tree.leaves(read)):
                if back is not ... and not all(map(np.array_equal, _bytes(leaf), _bytes(back))):
                    name = next("/".join(path) for path, other in leaves_by_path(tree).items() if other is leaf)
                    raise OSError(errno.EIO, f"{part}/{name} was read back with other bits than it has in memory")
    processes.gather_strings(topic=TOPIC)


def _in_groups(like: Any) -> Iterator[Any]:
    """Yields the tree for each group of its leaves, with `...` for the others, which Orbax does not read."""
    leaves, structure = jax.tree.flatten(like)
    groups = [total // GROUP_BYTES for total in itertools.accumulate(leaf.size * leaf.dtype.itemsize for leaf in leaves)]
    for group in dict.fromkeys(groups):
        yield jax.tree.unflatten(structure, [leaf if at == group else ... for leaf, at in zip(leaves, groups)])


def is_shared(leaf: Any) -> bool:
    """Whether an array lies on devices of several processes."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _bytes(leaf: Any) -> list[np.ndarray]:
    """Returns the bytes of this process's parts of an array."""
    parts = [shard.data for shard in leaf.addressable_shards] if is_shared(leaf) else [leaf]
    return [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]


def read(folder: Path, like: Any) -> Any:
    """Returns the arrays of one part of a checkpoint, with the structure, shapes, dtypes and shardings of `like`."""
    checkpoint, part = folder.parent, folder.name
    stored = _run_orbax(lambda ocp: ocp.metadata(checkpoint, part).metadata) if folder.is_dir() else {}
    _refuse_difference(folder, _kinds(like), _kinds(stored))
    load = lambda group: _run_orbax(lambda ocp: ocp.load(checkpoint, group, checkpointable_name=part))
    return _read_groups(folder, jax.tree.map(_as_abstract, like), load)


def read_alone(folder: Path) -> Any:
    """Returns the arrays of one part of a checkpoint as dicts and lists, read without the other processes.

    Reads from TensorStore, in which Orbax keeps them: importing Orbax would be a tenth of the time to a first token.
    """
    if not folder.is_dir():
        return {}
    import tensorstore

    metadata = read_json_object(folder / "_METADATA", MAX_METADATA_BYTES)
    try:
        entries = [entry for entry in metadata["tree_metadata"].values() if entry["value_metadata"]["value_type"] != "None"]
        paths = [[(key["key"], key["key_type"]) for key in entry["key_metadata"]] for entry in entries]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / '_METADATA'} is damaged: it does not name the arrays of a checkpoint.") from None
    database = {"driver": "ocdbt", "base": f"file://{folder}/"}
    source = lambda path: {"driver": "auto", "kvstore": {**database, "path": ".".join(name for name, _ in path) + "/"}}
    opening = [tensorstore.open(source(path), read=True) for path in paths]
    stores = _nest([(path, store.result()) for path, store in zip(paths, opening)])
    like = jax.tree.map(lambda store: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype), stores)

    def load(group: Any) -> Any:
        reading = jax.tree.map(lambda leaf, store: leaf if leaf is ... else store.read(), group, stores)
        return jax.tree.map(lambda leaf: leaf if leaf is ... else leaf.result(), reading)

    return _read_groups(folder, like, load)


def _nest(leaves: list[tuple[list[tuple[str, int]], Any]]) -> Any:
    """Returns the tree of (path, leaf); a path is of names, each with its kind in Orbax's metadata: 1 is a place in a list."""
    if not leaves[0][0]:
        return leaves[0][1]
    children: dict[str, list[Any]] = {}
    for ((name, _), *path), leaf in leaves:
        children.setdefault(name, []).append((path, leaf))
    tree = {name: _nest(inner) for name, inner in children.items()}
    is_list = leaves[0][0][0][1] == 1
    return [*tree.values()] if is_list else tree


def _read_groups(folder: Path, like: Any, load: Callable[[Any], Any]) -> Any:
    """Reads in groups, by load(group): touching new memory costs more than reading, and a group's serves the next.

    JAX copies NumPy's arrays, for a step cannot donate what only lies in their memory.
    """
    to_jax = lambda new: jax.device_put(new, may_alias=False) if isinstance(new, np.ndarray) else new
    tree = like
    for group in _in_groups(like):
        arrays = jax.tree.map(to_jax, load(group))
        tree = jax.block_until_ready(jax.tree.map(lambda leaf, new: leaf if new is ... else new, tree, arrays))
    _refuse_difference(folder, _kinds(like), _kinds(tree))  # without x64, JAX makes 32 bits of 64 in silence
    return tree


def _kinds(tree: Any) -> dict[tuple[str, ...], str]:
    return {path: f"{np.dtype(leaf.dtype).name} {tuple(leaf.shape)}" for path, leaf in leaves_by_path(tree).items()}


def _as_abstract(leaf: Any) -> Any:
    """Returns a leaf for Orbax to restore by its sharding, or into host memory (twice as fast on one device)."""
    if getattr(leaf, "sharding", None) is not None and getattr(leaf, "committed", True):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return _on_host(leaf)


def _on_host(leaf: Any) -> np.ndarray:
    """Returns a shape and a dtype without the memory, for Orbax to restore into host memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _refuse_difference(where: Path, wanted: dict, stored: dict) -> None:
    """Raises UserError for other paths, shapes or dtypes: Orbax casts dtypes in silence and blames a handler for shapes."""
    if differing := sorted({path for path, _ in wanted.items() ^ stored.items()}):
        expected, actual = (kinds.get(differing[0], "no such array") for kinds in (wanted, stored))
        more = f" ({len(differing) - 1} more arrays differ)" if len(differing) > 1 else ""
        raise UserError(
            f"{where} is of another model: at {'/'.join(differing[0])} {expected} was wanted and {actual} came{more}. "
            "Use the config it was trained with, or another folder."
        )

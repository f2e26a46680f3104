"""The digest changes with every bit, path, dtype and shape, and with nothing else."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.paths import array_paths
from engine.model.weights.lora import LoRA
from engine.storage.digest import describe_digests, digest

DTYPES = ("float32", "bfloat16", "float16", "int8", "int32", "uint32", "bool")


def array(seed: int, dtype: str) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(
        0, 2 if dtype == "bool" else 256, (3, 5 * jnp.dtype(dtype).itemsize)
    )
    return raw.astype(np.uint8).view(jnp.dtype(dtype))


def tree(seed: int = 0) -> dict:
    leaves = {dtype: array(seed + place, dtype) for place, dtype in enumerate(DTYPES)}
    return {
        "layers": {"0": leaves, "1": {"count": np.asarray(np.int32(seed))}},
        "head": array(seed + 9, "float32"),
    }


@settings(max_examples=200)
@given(st.data())
def test_every_single_bit_counts(data):
    params = tree(data.draw(st.integers(0, 9)))
    before = digest(params)
    leaf = data.draw(st.sampled_from(jax.tree.leaves(params)))
    place = data.draw(st.integers(0, leaf.nbytes - 1))
    bit = 0 if leaf.dtype == bool else data.draw(st.integers(0, 7))
    leaf.reshape(-1).view(np.uint8)[place] ^= 1 << bit
    assert digest(params) != before
    leaf.reshape(-1).view(np.uint8)[place] ^= 1 << bit
    assert digest(params) == before


@settings(max_examples=100)
@given(st.lists(st.text(), min_size=2, max_size=4, unique=True))
def test_every_path_counts(names):
    leaf = np.arange(4, dtype=np.int32)
    ways = [{names[0]: leaf}, {names[1]: leaf}]
    ways += [{names[0]: {names[1]: leaf}}, {names[1]: {names[0]: leaf}}]
    ways += [{f"{names[0]}/{names[1]}": {"": leaf}}, {f'{names[0]}", "{names[1]}': leaf}]
    ways += [{names[0]: leaf[:2], names[1]: leaf[2:]}, {names[0]: leaf[2:], names[1]: leaf[:2]}]
    assert len({digest(way) for way in ways}) == len({str(array_paths(way)) for way in ways})


def test_dtype_and_shape_count_even_with_the_same_bytes():
    raw = np.arange(24, dtype=np.uint8)
    ways = [
        raw.view(jnp.dtype(dtype)) for dtype in ("float32", "int32", "uint32", "bfloat16", "float16", "int8")
    ]
    ways += [ways[0].reshape(2, 3), ways[0].reshape(3, 2), ways[0].reshape(6, 1), ways[0].reshape(1, 6)]
    assert len({digest({"w": way}) for way in ways}) == len(ways)
    assert digest({"w": np.zeros((0, 3))}) != digest({"w": np.zeros((3, 0))})
    assert digest({"w": np.asarray(0, np.int32)}) != digest({"w": np.asarray([0], np.int32)})
    assert digest({"w": np.asarray([0.0])}) != digest({"w": np.asarray([-0.0])})


def test_where_an_array_lies_does_not_count():
    params = tree()
    on_device = jax.tree.map(jnp.asarray, params)
    strided = jax.tree.map(
        lambda leaf: np.asfortranarray(np.repeat(leaf, 2, 0))[::2] if leaf.ndim else leaf, params
    )
    reordered = {"layers": dict(reversed(params["layers"].items())), "head": params["head"]}
    assert digest(params) == digest(on_device) == digest(strided) == digest(dict(reversed(reordered.items())))


def test_containers_do_not_count_but_their_names_do():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Pair:
        values: np.ndarray
        scale: np.ndarray

    values, scale = array(0, "int8"), array(1, "float32")
    assert digest({"w": Pair(values, scale)}) == digest({"w": {"values": values, "scale": scale}})
    assert digest({"w": Pair(values, scale)}) != digest({"w": Pair(scale, values)})
    assert (
        digest({"w": (values, scale)})
        == digest({"w": [values, scale]})
        == digest({"w": {"0": values, "1": scale}})
    )
    assert digest({}) == digest({"w": {}}) != digest({"w": values})


@pytest.mark.parametrize("leaf", [1.0, "text", np.asarray([None]), jax.random.key(0)])
def test_what_is_no_array_of_numbers_is_refused(leaf):
    with pytest.raises(TypeError):
        digest({"layers": {"w": leaf}})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="one path"):
        digest({"a": collections.OrderedDict([(0, np.ones(2)), ("0", np.ones(3))])})


def test_the_scale_of_an_adapter_counts_as_it_multiplies():
    base, a, b = array(0, "float32"), array(1, "float32"), array(2, "float32")

    def digests(scale: float, inner: float = 1.0, scales: bool = True) -> tuple[str, str]:
        adapted = LoRA(LoRA(base, a, b, inner), a, b, scale)
        return digest({"w": LoRA(None, a, b, scale)}, scales), digest({"w": adapted}, scales)

    assert digests(2.0) == digests(2.0 + 2**-40)  # one float32
    assert not {*digests(2.0)} & {*digests(4.0)}
    assert digests(2.0)[1] != digests(2.0, inner=3.0)[1]
    assert digests(2.0, scales=False) == digests(4.0, 3.0, scales=False)
    assert digest({"w": LoRA(base, a, b, 2.0)}, scales=False) == digest({"w": {"base": base, "a": a, "b": b}})


def test_a_change_names_both_digests():
    before = "a" * 64
    after = "b" * 64
    assert describe_digests(before, before) == f"weights unchanged: SHA-256 {'a' * 16} before and after"
    assert (
        describe_digests(before, after) == f"weights CHANGED: SHA-256 {'a' * 16} before and {'b' * 16} after"
    )

"""KVInC: the KV cache of many slots where the kernels in C attend. They read as far as a row's text reaches, of one segment."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from engine.model.cache.segmented import KVSegments, SegmentedLayer, mask_padding, stored_heads, write_new
from engine.model.layers import group_heads, join_heads
from engine.model.native.library import target


class LayerInC(SegmentedLayer):
    """One layer of the cache of a call."""

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, "LayerInC"]:
        """As of a SegmentedLayer. The result of padding is NaN: products in blocks skip rows that
        are not finite.
        """
        R, T, _, _ = q.shape
        if T == 1 and R > 1:
            return decode_attention(q, k, v, self)
        return prefill_attention(q, k, v, self)


class KVInC(KVSegments):
    """k and v: for each layer one segment, the keys or values (B, K, S, H) of all positions in all slots."""

    @property
    def layer_type(self) -> type[LayerInC]:
        return LayerInC


def decode_attention(q: Array, k: Array, v: Array, layer: LayerInC) -> tuple[Array, LayerInC]:
    """Attends from one token of each row, and writes its keys and values in place. Arguments as of
    `SegmentedLayer.attend`.
    """
    new = stored_heads(k, v, layer)
    queries = group_heads(q.astype(layer.query_dtype), k.shape[2])[:, :, :, 0]  # (R, K, G, H)
    stored, tree = jax.tree.flatten((layer.k, layer.v))
    inputs = [queries.astype(jnp.float32), *layer.rows[:4], *jax.tree.leaves(new)]
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (inputs[0], *stored)]
    # Each stored array, behind the inputs, is written in place: it is a result behind the first.
    aliases = {len(inputs) + i: 1 + i for i in range(len(stored))}
    kernel = jax.ffi.ffi_call(target("decode_attention"), shapes, input_output_aliases=aliases)
    out, *stored = kernel(*inputs, *stored)
    keys, values = jax.tree.unflatten(tree, stored)
    return join_heads(out[:, :, :, None]).astype(q.dtype), layer._replace(k=keys, v=values)


def prefill_attention(q: Array, k: Array, v: Array, layer: LayerInC) -> tuple[Array, LayerInC]:
    """Writes the keys and values of a prompt's tokens, then attends. Arguments as of
    `SegmentedLayer.attend`.
    """
    R, T, N, H = q.shape
    new = stored_heads(k, v, layer)
    queries = q.astype(layer.query_dtype)
    layer = write_new(layer, *new)
    shape = jax.ShapeDtypeStruct((R, T, N * H), queries.dtype)
    kernel = jax.ffi.ffi_call(target("prefill_attention"), shape)
    out = kernel(queries, layer.rows.position, layer.rows.slot, *jax.tree.leaves((layer.k, layer.v)))
    return mask_padding(out.astype(q.dtype), jnp.nan, layer.rows.is_token), layer


def empty_cache(shapes: KVSegments) -> KVSegments:
    """Returns a cache of these shapes by a kernel: zeros that XLA writes would take memory at once."""
    leaves, tree = jax.tree.flatten(shapes)
    empty: Any = jax.ffi.ffi_call(target("empty_cache"), leaves)()
    return jax.tree.unflatten(tree, empty)

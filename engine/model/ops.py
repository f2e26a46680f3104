"""Chooses by platform how the model's products and attention of whole texts go, and says whether the kernels in C compute.

What else these change, in an engine, is in `inference/backend.py`. The platform is that of JAX's
default device where the program is traced. JAX keeps its traces by that device, so `with
jax.default_device("tpu")` traces any program for a TPU, on a machine that has none.

Attention is fused where a kernel exists: cuDNN on NVIDIA's GPUs, splash attention on a TPU, and on
a CPU the one in C. No scores reach memory: a kernel keeps a block of them at a time and computes
them anew in its own backward pass (Dao et al. 2022, 2205.14135). Each takes q (B, T, N, H) scaled
by H ** -0.5, k and v (B, T, K, H), segments (B, T) int32 or None, and returns causal attention (B,
T, N * H); or None for shapes, types and machines that it cannot serve.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from engine.model.native.library import native_problem, target

Kernel = Callable[[Array, Array, Array, Array | None], Array | None]
LANES = 128  # numbers in a row of a TPU's vector unit: the kernel's blocks are multiples of it


def cudnn(q: Array, k: Array, v: Array, segments: Array | None) -> Array | None:
    """cuDNN's attention, in 16 bits, on an NVIDIA GPU from Ampere on, where JAX has found cuDNN."""
    mask = None
    if segments is not None:
        mask = segments[:, :, None] == segments[:, None, :]
    return cudnn_masked(q, k, v, mask, causal=True)


def cudnn_masked(q: Array, k: Array, v: Array, mask: Array | None, *, causal: bool = False) -> Array | None:
    """As `cudnn`, with keys (B, S, K, H) and a mask (B, T, S) that is True where a query may attend."""
    mask_by_head = None
    if mask is not None:
        # cuDNN has no gradient for a mask of an odd length, and says so too late.
        if q.shape[1] % 2 or k.shape[1] % 2:
            return None
        mask_by_head = mask[:, None]
    try:
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask_by_head, is_causal=causal, scale=1.0, implementation="cudnn"
        )
    # for want of cuDNN or of a card that it knows, or because of the type or the shape
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if jax.default_backend() == "gpu":
            warnings.warn(
                f"cuDNN's attention cannot serve {q.dtype}{q.shape}, so plain products do: {error}",
                stacklevel=2,
            )
        return None
    return out.reshape(*out.shape[:2], -1)


def splash(q: Array, k: Array, v: Array, segments: Array | None, *, interpret: bool = False) -> Array:
    """Splash attention, JAX's own kernel for TPUs, which skips the blocks that causality masks.

    Texts are padded to a multiple of LANES: what lies behind a token is masked in any case.
    """
    # Here, for Pallas takes half a second to import, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    B, T, N, _ = q.shape
    padded = T + -T % LANES
    block = next(size for size in (512, 256, LANES) if padded % size == 0)
    names = [field.name for field in dataclasses.fields(pallas.BlockSizes) if field.name.startswith("block_")]
    blocks: Any = dict.fromkeys(names, block)
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([pallas.CausalMask((padded, padded)) for _ in range(N)]),
        block_sizes=pallas.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def by_head(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    def attend(q: Array, k: Array, v: Array, *ids: Array) -> Array:
        return kernel(q, k, v, *(pallas.SegmentIds(each, each) for each in ids))

    ids: list[Array] = []
    if segments is not None:
        ids = [jnp.pad(segments, ((0, 0), (0, padded - T)))]
    out = jax.vmap(attend)(by_head(q), by_head(k), by_head(v), *ids)
    return out.transpose(0, 2, 1, 3)[:, :T].reshape(B, T, -1)


def native(q: Array, k: Array, v: Array, segments: Array | None) -> Array | None:
    """The kernel in C, in float32 and bfloat16, where it can be built."""
    if q.dtype.name not in ("float32", "bfloat16") or native_problem():
        return None
    if segments is None:
        segments = jnp.zeros(0, jnp.int32)
    return _native(q, k, v, segments)


@jax.custom_vjp
def _native(q: Array, k: Array, v: Array, segments: Array) -> Array:
    return _native_forward(q, k, v, segments)[0]


def _native_forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    """Keeps each softmax's largest score and its sum (B, N, 2, T), from which the backward pass
    computes the weights anew.
    """
    B, T, N, H = q.shape
    result = jax.ShapeDtypeStruct((B, T, N * H), q.dtype)
    sums_of_weights = jax.ShapeDtypeStruct((B, N, 2, T), jnp.float32)
    shapes = (result, sums_of_weights)
    kernel = jax.ffi.ffi_call(target("causal_attention"), shapes, vmap_method="sequential")
    out, sums = kernel(q, k, v, segments)
    return out, (q, k, v, segments, out, sums)


def _native_backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals[:3]]
    backward = jax.ffi.ffi_call(target("causal_attention_backward"), shapes, vmap_method="sequential")
    return (*backward(*residuals, g), None)


_native.defvjp(_native_forward, _native_backward)


class Ops(NamedTuple):
    """What a platform needs, and which kernels it has."""

    # see `transpose`
    transposes_in_memory: bool
    # A product with one row gets a second: with one the CPU converts the whole weight at each call,
    # which is 18 times slower.
    pads_lone_row: bool
    # causal, of whole texts
    fused_attention: Kernel | None
    # of a prompt's chunk over cached keys, by a mask
    fused_prefill: Kernel | None = None


PLATFORMS = {
    "cpu": Ops(transposes_in_memory=True, pads_lone_row=True, fused_attention=native),
    "gpu": Ops(
        transposes_in_memory=False,
        pads_lone_row=False,
        fused_attention=cudnn,
        fused_prefill=cudnn_masked,
    ),
    "tpu": Ops(transposes_in_memory=False, pads_lone_row=False, fused_attention=splash),
}


def platform() -> str:
    """Returns the platform that JAX computes on by default: a key of PLATFORMS."""
    device = jax.config.jax_default_device or jax.default_backend()
    if isinstance(device, str):
        return device
    return device.platform


def computes_in_c() -> bool:
    """Returns whether kernels in C compute: on one CPU where they can be built. XLA computes near
    what they do elsewhere.
    """
    return _on_one_cpu() and not native_problem()


def kernels_note() -> str:
    """Returns what a banner says of the kernels in C behind the device: with and without them the last
    bits differ.
    """
    if not _on_one_cpu():
        return ""
    problem = native_problem()
    if problem:
        return f"; decoding would be faster with the kernels in C, but {problem}"
    return "; kernels in C"


def _on_one_cpu() -> bool:
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().empty


def ops() -> Ops:
    return PLATFORMS[platform()]


def transpose(x: Array) -> Array:
    """x (..., M, N) -> (..., N, M), where a product needs it turned over. On a CPU it is moved in
    memory.

    There XLA hands a product to its fast library only when the left operand lies in memory with the
    summed axis last; the fallback is ten times slower. Without the barrier XLA folds the transpose
    into a neighbouring product, without the layout it relabels the axes: held by
    tests/laws/test_barriers.py.
    """
    if not ops().transposes_in_memory:
        return x.swapaxes(-1, -2)
    x = jax.lax.optimization_barrier(x).swapaxes(-1, -2)
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def over_rows(x: Array, multiply: Callable[[Array], Array]) -> Array:
    """Returns multiply(rows (M, in)) for x (..., in), as (..., out); a lone row is doubled where a
    product needs that.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1 and ops().pads_lone_row:
        out = multiply(jnp.concatenate([rows, rows]))[:1]
    else:
        out = multiply(rows)
    return out.reshape(*x.shape[:-1], out.shape[-1])

"""Fused attention where a kernel exists: cuDNN on NVIDIA's GPUs, splash attention on a TPU.

No scores reach memory: a kernel keeps a block of them at a time and computes them anew in its own backward pass (Dao et al.
2022, 2205.14135). Each takes q (B, T, N, H) scaled by H ** -0.5, k and v (B, T, K, H), segments (B, T) int32 or None, and
returns causal attention (B, T, N * H); or None for shapes, types and machines that it cannot serve.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Kernel = Callable[[Array, Array, Array, Array | None], Array | None]
LANES = 128  # numbers in a row of a TPU's vector unit: the kernel's blocks are multiples of it


def cudnn(q: Array, k: Array, v: Array, segments: Array | None) -> Array | None:
    """cuDNN's attention, in 16 bits, on an NVIDIA GPU from Ampere on, where JAX has found cuDNN.

    With segments the mask is one (B, 1, T, T) array of 16 bits for all heads.
    """
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])
    return cudnn_masked(q, k, v, mask, causal=True)


def cudnn_masked(q: Array, k: Array, v: Array, mask: Array | None, *, causal: bool = False) -> Array | None:
    """As `cudnn`, with keys (B, S, K, H) and a mask (B, T, S) that is True where a query may attend."""
    if mask is not None and (q.shape[1] % 2 or k.shape[1] % 2):  # cuDNN has no gradient for it, and says so too late
        return None
    heads = None if mask is None else mask[:, None]
    try:
        out = jax.nn.dot_product_attention(q, k, v, mask=heads, is_causal=causal, scale=1.0, implementation="cudnn")
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:  # of cuDNN, the card, the type or the shape
        if jax.default_backend() == "gpu":
            warnings.warn(f"cuDNN's attention cannot serve {q.dtype}{q.shape}, so plain products do: {error}", stacklevel=2)
        return None
    return out.reshape(*out.shape[:2], -1)


def splash(q: Array, k: Array, v: Array, segments: Array | None, *, interpret: bool = False) -> Array:
    """Splash attention, JAX's own kernel for TPUs, which skips the blocks that causality masks.

    Texts are padded to a multiple of LANES: what lies behind a token is masked in any case.
    """
    B, T, N, _ = q.shape
    padded = T + -T % LANES
    kernel = _splash_kernel(padded, N, interpret)
    by_head = lambda x: jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    if segments is None:
        out = jax.vmap(kernel)(by_head(q), by_head(k), by_head(v))
    else:
        ids = jnp.pad(segments, ((0, 0), (0, padded - T)))
        out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, _same(ids)))(by_head(q), by_head(k), by_head(v), ids)
    return out.transpose(0, 2, 1, 3)[:, :T].reshape(B, T, -1)


def _same(segments: Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(segments, segments)


def _splash_kernel(T: int, N: int, interpret: bool) -> Any:
    # Here, for Pallas takes half a second to import, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in (512, 256, LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((T, T)) for _ in range(N)])
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)

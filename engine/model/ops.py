"""Chooses how a program is computed by the platform that it is compiled for: the one table of what differs.

That is the platform of JAX's default device where the program is traced. The default device is part of the key under which
JAX keeps its traces, so `with jax.default_device("tpu")` traces any program for a TPU, on a machine that has none, and
nobody passes a platform along. Everything that is not here is the same program everywhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from engine.model import fused_attention


def _transpose_in_memory(x: Array) -> Array:
    """x (..., M, N) -> (..., N, M), moved in memory.

    XLA on a CPU hands a product to its fast library only when the left operand lies in memory with the summed axis last;
    the fallback is ten times slower. Without the barrier XLA folds the transpose into a neighbouring product, without the
    layout it relabels the axes; either way the next product takes the slow path.
    """
    x = jax.lax.optimization_barrier(x).swapaxes(-1, -2)
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _transpose_by_name(x: Array) -> Array:
    """x (..., M, N) -> (..., N, M): a GPU's and a TPU's product reads its operands in either order."""
    return x.swapaxes(-1, -2)


class Ops(NamedTuple):
    """The choices of one platform."""

    transpose: Callable[[Array], Array]
    pads_lone_row: bool  # to two: with one row the CPU's product converts the whole weight at each call, 18 times slower
    fused_attention: fused_attention.Kernel | None  # causal, of whole texts
    fused_prefill: fused_attention.Kernel | None = None  # of a prompt's chunk over cached keys, by a mask


PLATFORMS = {
    # jax.nn.dot_product_attention is two to three times slower than the plain products on a CPU.
    "cpu": Ops(_transpose_in_memory, True, None),
    "gpu": Ops(_transpose_by_name, False, fused_attention.cudnn, fused_attention.cudnn_masked),
    "tpu": Ops(_transpose_by_name, False, fused_attention.splash),
}


def platform() -> str:
    """Returns the platform that JAX computes on: 'cpu', 'gpu' or 'tpu'."""
    device = jax.config.jax_default_device or jax.default_backend()
    return device if isinstance(device, str) else device.platform


def ops() -> Ops:
    """Returns the choices of the platform that JAX computes on."""
    return PLATFORMS[platform()]


def transpose(x: Array) -> Array:
    """x (..., M, N) -> (..., N, M), where a product needs it turned over."""
    return ops().transpose(x)

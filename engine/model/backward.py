"""The functions of `layers.py` with backward rules by hand (custom_vjp), the same on every platform.

A weight's gradient is summed and returned in float32, and no float32 copy of an activation is kept
for the backward pass. The rules of `jax.grad` do neither. Where a product needs an operand turned
over, it goes through `ops.transpose`. The barriers are held by tests/laws/test_barriers.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from engine.mesh import layout
from engine.model import layers
from engine.model.ops import transpose


def _with_backward[F: Callable[..., Any]](
    f: F, backward: Callable[..., Any], static: tuple[int, ...] = (2,)
) -> F:
    """Returns f with the rule backward(*static arguments, (a, b), gradient); a and b are f's first
    two arguments.
    """
    rule: Any = jax.custom_vjp(f, nondiff_argnums=static)

    def forward(a: Any, b: Any, *options: Any) -> tuple[Any, tuple[Any, Any]]:
        return f(a, b, *options), (a, b)

    rule.defvjp(forward, backward)
    return rule


def matmul_backward(dtype: DTypeLike, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """Returns dx = g w^T and dw = x^T g, summed in float32. Transposes the narrower of x and g, the
    cheaper copy.
    """
    x, w = residuals
    w, g = layout.regather(w, g.astype(x.dtype))
    dx = jnp.einsum("mf,df->md", g, w.astype(x.dtype), preferred_element_type=x.dtype)
    if x.shape[1] <= g.shape[1]:
        dw = layers.dot32(transpose(x), g)
    else:
        dw = transpose(layers.dot32(transpose(g), x))
    return dx, dw.astype(w.dtype)


matmul = _with_backward(layers.matmul, matmul_backward)


def matmul_rows_backward(dtype: DTypeLike, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """Returns dx = g w and dw = g^T x."""
    x, w = residuals
    w, g = layout.regather(w, g.astype(x.dtype))
    dx = jnp.dot(g, w.astype(x.dtype), preferred_element_type=x.dtype)
    dw = transpose(layers.dot32(transpose(x), g))
    return dx, dw.astype(w.dtype)


matmul_rows = _with_backward(layers.matmul_rows, matmul_rows_backward)


def _lookup_backward(residuals: tuple[Array, Array], g: Array):
    """Returns dembed, the sum of g over the tokens of each row, and None: tokens have no gradient."""
    embed, tokens = residuals
    flat = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    dembed = jnp.zeros(embed.shape, jnp.float32).at[tokens.reshape(-1)].add(flat)
    return dembed.astype(embed.dtype), None


lookup = _with_backward(layers.lookup, _lookup_backward, ())


def _rms_norm_backward(eps: float, dtype: DTypeLike, residuals: tuple[Array, Array], g: Array):
    """With y = x / rms(x) and g the gradient times the gain: dx = (g - y mean(g y)) / rms(x)."""
    x, gain = residuals
    # Without the barrier XLA would keep float32 values of the forward pass: a sixth more memory for
    # a step.
    x32, g32 = (a.astype(jnp.float32) for a in jax.lax.optimization_barrier((x, g)))
    inverse = _inverse_rms(x32, eps)
    dgain = None
    if gain is not None:
        dgain = _gain_backward(x, g, gain, eps)
        g32 = g32 * gain
    inner = jnp.mean(g32 * x32, axis=-1, keepdims=True) * inverse**2
    return ((g32 - x32 * inner) * inverse).astype(x.dtype), dgain


def _gain_backward(x: Array, g: Array, gain: Array, eps: float) -> Array:
    """Returns the sum of g x / rms(x) over all but the gain's axes.

    Each barrier keeps XLA from making one float32 copy of x or g for two loops: half of the time of
    the norm's backward pass.
    """
    x, g = jax.lax.optimization_barrier((x, g))
    x_for_rms = jax.lax.optimization_barrier(x)
    inverse = jax.lax.optimization_barrier(_inverse_rms(x_for_rms.astype(jnp.float32), eps))
    x32, g32 = (a.astype(jnp.float32) for a in jax.lax.optimization_barrier((x, g)))
    leading_axes = tuple(range(x.ndim - gain.ndim))
    return jnp.sum(g32 * x32 * inverse, axis=leading_axes).astype(gain.dtype)


def _inverse_rms(x: Array, eps: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


rms_norm = _with_backward(layers.rms_norm, _rms_norm_backward, (2, 3))


def _swiglu_backward(dtype: DTypeLike, residuals: tuple[Array, Array], g: Array):
    """With s = sigmoid(gate): dgate = g up s (1 + gate (1 - s)), dup = g gate s."""
    # Without the barrier XLA would keep the forward pass's sigmoid, as large as both.
    gate, up, g = (a.astype(jnp.float32) for a in jax.lax.optimization_barrier((*residuals, g)))
    s = jax.nn.sigmoid(gate)
    dgate = g * up * s * (1 + gate * (1 - s))
    return dgate.astype(residuals[0].dtype), (g * gate * s).astype(residuals[1].dtype)


swiglu = _with_backward(layers.swiglu, _swiglu_backward)


def _rotate(x: Array, cos: Array, sin: Array, scale: float, dtype: DTypeLike) -> Array:
    """Returns scale * x rotated, with x (B, T, N, H) as (B, T, N, 2, H / 2): exchanging halves is reversing
    an axis, ten times as fast as inside H. The barrier keeps the loop to this shape.
    """
    pairs = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    # The barrier keeps each head from computing the tables anew.
    cos, sin = jax.lax.optimization_barrier((cos, jnp.stack([-sin, sin], axis=2)))
    cos = cos[:, :, None, None]
    sin = sin[:, :, None]
    rotated = (pairs.astype(jnp.float32) * cos + jnp.flip(pairs, axis=-2).astype(jnp.float32) * sin) * scale
    return jax.lax.optimization_barrier(rotated.astype(dtype)).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def rope(x: Array, cos: Array, sin: Array, scale: float, dtype: DTypeLike) -> Array:
    """As `layers.rope`. Backward is the rotation the other way; positions get no gradient."""
    return _rotate(x, cos, sin, scale, dtype)


def _rope_forward(x: Array, cos: Array, sin: Array, scale: float, dtype: DTypeLike):
    return rope(x, cos, sin, scale, dtype), (jnp.zeros((), x.dtype), cos, sin)


def _rope_backward(scale: float, dtype: DTypeLike, residuals: tuple[Array, ...], g: Array):
    like, cos, sin = residuals
    return _rotate(g, cos, -sin, scale, like.dtype), None, None


rope.defvjp(_rope_forward, _rope_backward)

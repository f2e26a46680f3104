"""The functions of `layers.py` with backward rules by hand (custom_vjp), in shapes that a CPU's matrix units can use.

XLA on the CPU hands a product to its fast library only when the left operand lies in memory with the summed axis last.
The transpose rule of `jax.grad` never yields that for a weight's gradient, and the fallback is ten times slower. So these
rules first make one small transpose.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from engine.model import layers

QUERY_BLOCK = 128  # queries a block of causal attention: keys after the block are never multiplied


def transpose(x: Array) -> Array:
    """x (..., M, N) -> (..., N, M), moved in memory.

    Without the barrier XLA folds it into a neighbouring product, without the layout it relabels the axes; either way
    the next product takes the slow path.
    """
    x = jax.lax.optimization_barrier(x).swapaxes(-1, -2)
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _with_backward[F: Callable[..., Any]](f: F, backward: Callable[..., Any], static: tuple[int, ...] = (2,)) -> F:
    """Returns f with the rule backward(*static arguments, (a, b), gradient); a and b are f's first two arguments."""
    rule = jax.custom_vjp(f, nondiff_argnums=static)
    rule.defvjp(lambda a, b, *options: (f(a, b, *options), (a, b)), backward)
    return rule  # type: ignore[return-value]


def matmul_backward(dtype: DTypeLike, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """dx = g w^T and dw = x^T g, summed in float32. Transposes the narrower of x and g, the cheaper copy."""
    x, w = residuals
    g = g.astype(x.dtype)
    dx = jnp.einsum("mf,df->md", g, w.astype(x.dtype), preferred_element_type=x.dtype)
    if x.shape[1] <= g.shape[1]:
        dw = layers.dot32(transpose(x), g)
    else:
        dw = transpose(layers.dot32(transpose(g), x))
    return dx, dw.astype(w.dtype)


matmul = _with_backward(layers.matmul, matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_two(x: Array, w: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """As `layers.matmul_two`, in two products, so that backward has nothing to cut or join."""
    left, right = jnp.split(w.astype(x.dtype), 2, axis=1)
    return jnp.dot(x, left, preferred_element_type=dtype), jnp.dot(x, right, preferred_element_type=dtype)


def _matmul_two_backward(dtype: DTypeLike, residuals: tuple[Array, Array], gs: tuple[Array, Array]):
    x, w = residuals
    left, right = gs[0].astype(x.dtype), gs[1].astype(x.dtype)
    w_left, w_right = jnp.split(w.astype(x.dtype), 2, axis=1)
    dx = layers.einsum32("mf,df->md", left, w_left)
    dx = dx + layers.einsum32("mf,df->md", right, w_right)
    x_transposed = transpose(x)
    dw = jnp.concatenate([layers.dot32(x_transposed, g) for g in (left, right)], axis=1)
    return dx.astype(x.dtype), dw.astype(w.dtype)


matmul_two.defvjp(lambda x, w, dtype: (matmul_two(x, w, dtype), (x, w)), _matmul_two_backward)


def matmul_rows_backward(dtype: DTypeLike, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """dx = g w and dw = g^T x."""
    x, w = residuals
    g = g.astype(x.dtype)
    dx = jnp.dot(g, w.astype(x.dtype), preferred_element_type=x.dtype)
    dw = transpose(layers.dot32(transpose(x), g))
    return dx, dw.astype(w.dtype)


matmul_rows = _with_backward(layers.matmul_rows, matmul_rows_backward)


def _lookup_backward(residuals: tuple[Array, Array], g: Array):
    """Adds each row's gradient to its token's row, in float32."""
    embed, tokens = residuals
    flat = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    return jnp.zeros(embed.shape, jnp.float32).at[tokens.reshape(-1)].add(flat).astype(embed.dtype), None


lookup = _with_backward(layers.lookup, _lookup_backward, ())


def _rms_norm_backward(eps: float, dtype: DTypeLike, residuals: tuple[Array, Array], g: Array):
    """With y = x / rms(x) and g the gradient times the gain: dx = (g - y mean(g y)) / rms(x)."""
    x, gain = residuals
    # Without the barrier XLA would keep float32 values of the forward pass: a sixth more memory for a step.
    x32, g = (a.astype(jnp.float32) for a in jax.lax.optimization_barrier((x, g)))
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    dgain = None
    if gain is not None:
        dgain = jnp.sum(g * x32 * inverse, axis=tuple(range(x.ndim - gain.ndim))).astype(gain.dtype)
        g = g * gain
    inner = jnp.mean(g * x32, axis=-1, keepdims=True) * inverse**2
    return ((g - x32 * inner) * inverse).astype(x.dtype), dgain


rms_norm = _with_backward(layers.rms_norm, _rms_norm_backward, (2, 3))


def _swiglu_backward(dtype: DTypeLike, residuals: tuple[Array, Array], g: Array):
    """With s = sigmoid(gate): dgate = g up s (1 + gate (1 - s)), dup = g gate s."""
    # Without the barrier XLA would keep the forward pass's sigmoid, as large as both.
    gate, up, g = (a.astype(jnp.float32) for a in jax.lax.optimization_barrier((*residuals, g)))
    s = jax.nn.sigmoid(gate)
    dgate = g * up * s * (1 + gate * (1 - s))
    return dgate.astype(residuals[0].dtype), (g * gate * s).astype(residuals[1].dtype)


swiglu = _with_backward(layers.swiglu, _swiglu_backward)


def _swap_halves(x: Array) -> Array:
    """Exchanges the halves of x (..., H), as a reversal because that stays inside an elementwise loop.

    A product with a permutation is 2% of a step faster, but would be counted as work of the model.
    """
    pairs = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return jnp.flip(pairs, axis=-2).reshape(x.shape)


def _whole_tables(cos: Array, sin: Array) -> tuple[Array, Array]:
    """(B, T, H / 2) -> (B, T, 1, H): cosines twice, sines with the sign each half takes."""
    return jnp.concatenate([cos, cos], -1)[:, :, None], jnp.concatenate([-sin, sin], -1)[:, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def rope(x: Array, scale: Array, cos: Array, sin: Array, dtype: DTypeLike) -> Array:
    """As `layers.rope`. Backward is the rotation the other way; scale and positions get no gradient."""
    cos, sin = _whole_tables(cos, sin)
    return ((x.astype(jnp.float32) * cos + _swap_halves(x).astype(jnp.float32) * sin) * scale[:, None]).astype(dtype)


def _rope_backward(dtype: DTypeLike, residuals: tuple[Array, ...], g: Array):
    like, scale, cos, sin = residuals
    cos, sin = _whole_tables(cos, sin)
    dx = (g.astype(jnp.float32) * cos - _swap_halves(g).astype(jnp.float32) * sin) * scale[:, None]
    # Without the barrier the norm's backward pass would take the rotation in, and spread each table over all tokens first.
    return jax.lax.optimization_barrier(dx.astype(like.dtype)), None, None, None


rope.defvjp(lambda x, scale, *rest: (rope(x, scale, *rest), (jnp.zeros((), x.dtype), scale, *rest[:2])), _rope_backward)


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """As `layers.attention`, for cached keys: forward only, without a product of a single row, which is slow on a CPU."""
    if q.shape[1] * q.shape[2] > k.shape[1]:
        return layers.attention(q, k, v, mask)
    return layers.attention(jnp.concatenate([q, q], axis=1), k, v, jnp.concatenate([mask, mask], axis=1))[:, :1]


@jax.custom_vjp
def causal_attention(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """q (B, T, N, H) scaled by H ** -0.5, k and v (B, T, K, H), segments (B, T) or None -> (B, T, N * H).

    As `layers.causal_attention`, in blocks of queries, each against the keys up to its own end. Scores are key-major
    (S, T): then every product of both passes reads its operands along the last axis, and only arrays of head width are
    transposed. The softmax weights are residuals: B N T T / 2 numbers.
    """
    return _causal_attention_forward(q, k, v, segments)[0]


def _blocks(T: int) -> list[tuple[int, int]]:
    size = QUERY_BLOCK if T % QUERY_BLOCK == 0 else T
    return [(start, start + size) for start in range(0, T, size)]


def _rows(x: Array, start: int, end: int) -> Array:
    """Queries start..end of x (B, K, G, T, H), heads of a group side by side: (B, K, G * block, H)."""
    B, K, G, _, H = x.shape
    return x[:, :, :, start:end].reshape(B, K, G * (end - start), H)


def _block_mask(start: int, end: int, G: int, segments: Array | None) -> Array:
    """(1 or B, 1, S=end, G * block): the causal mask of one block, key-major."""
    mask = jnp.arange(end)[:, None] <= jnp.arange(start, end)[None]
    if segments is None:
        return jnp.tile(mask, (1, G))[None, None]
    same = segments[:, :end, None] == segments[:, None, start:end]
    return jnp.tile(mask[None] & same, (1, 1, G))[:, None]


def _causal_attention_forward(q: Array, k: Array, v: Array, segments: Array | None):
    B, T, N, H = q.shape
    K = k.shape[2]
    q, k, v = layers.group_heads(q, K), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    v_transposed = transpose(v)
    weights, out = [], []
    for start, end in _blocks(T):
        scores = layers.einsum32("bksh,bkrh->bksr", k[:, :, :end], _rows(q, start, end))
        mask = _block_mask(start, end, N // K, segments)
        p = jax.nn.softmax(jnp.where(mask, scores, layers.MASKED), axis=-2).astype(v.dtype)
        o = jnp.einsum("bkhs,bksr->bkhr", v_transposed[..., :end], p, preferred_element_type=v.dtype)
        weights.append(p)
        out.append(o.reshape(B, K, H, N // K, end - start))
    o = transpose(jnp.concatenate(out, axis=-1).transpose(0, 1, 3, 2, 4))  # (B, K, G, T, H)
    return layers.join_heads(o), (q, k, v, segments, weights, o)


def _causal_attention_backward(residuals: Any, g: Array):
    """With P the weights and o = P v: dv = P^T g, dP = g v^T, dS = P (dP - sum(o g)), dq = dS k, dk = dS^T q."""
    q, k, v, _, weights, o = residuals
    B, K, G, T, H = q.shape
    g = layers.group_heads(g.reshape(B, T, K * G, H), K)
    delta = jnp.sum(o.astype(jnp.float32) * g.astype(jnp.float32), axis=-1)  # (B, K, G, T)
    k_transposed = transpose(k)
    dq_blocks: list[Array] = []
    dk = dv = jnp.zeros(k.shape, jnp.float32)
    for p, (start, end) in zip(weights, _blocks(T)):
        g_rows = _rows(g, start, end)
        dp = layers.einsum32("bksh,bkrh->bksr", v[:, :, :end], g_rows)
        ds = p.astype(jnp.float32) * (dp - delta[..., start:end].reshape(B, K, 1, -1))
        ds = ds.astype(p.dtype)
        dq_block = jnp.einsum("bkhs,bksr->bkhr", k_transposed[..., :end], ds, preferred_element_type=q.dtype)
        dq_blocks.append(dq_block.reshape(B, K, H, G, end - start))
        dk_block = layers.einsum32("bksr,bkrh->bksh", ds, _rows(q, start, end))
        dv_block = layers.einsum32("bksr,bkrh->bksh", p, g_rows)
        rest = ((0, 0), (0, 0), (0, T - end), (0, 0))
        dk, dv = dk + jnp.pad(dk_block, rest), dv + jnp.pad(dv_block, rest)
    dq = transpose(jnp.concatenate(dq_blocks, axis=-1).transpose(0, 1, 3, 2, 4))
    dq = dq.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
    return dq, dk.astype(k.dtype).transpose(0, 2, 1, 3), dv.astype(v.dtype).transpose(0, 2, 1, 3), None


causal_attention.defvjp(_causal_attention_forward, _causal_attention_backward)

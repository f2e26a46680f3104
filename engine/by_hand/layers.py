"""The layers in NumPy, each forward and backward.

Where y = f(x) and the loss depends on x only through y, the chain rule says

    dx[j] = sum over i of dy[i] * (derivative of y[i] by x[j]),

and each docstring works that sum out for one f. A backward function's arguments after dy are its
residuals.
"""

import math

import numpy as np
from numpy import ndarray

from engine.model.config import ModelConfig, YarnScaling

# Embedding


def lookup(embed: ndarray, tokens: ndarray) -> ndarray:
    """embed (V, D), tokens (B, T) -> (B, T, D): rows of the table."""
    return embed[tokens]


def lookup_backward(dy: ndarray, tokens: ndarray, V: int) -> ndarray:
    """dy (B, T, D) -> dembed (V, D).

    y[b, t] is a copy of one row, whose derivative is the sum of dy over its copies; zero for a row
    never read.
    """
    dembed = np.zeros((V, dy.shape[-1]), dy.dtype)
    np.add.at(dembed, tokens, dy)
    return dembed


# Matrix product


def project(x: ndarray, weight: ndarray) -> ndarray:
    """x (..., in), weight (in, out) -> y (..., out): y[m, f] = sum over d of x[m, d] weight[d, f]."""
    return (_rows(x) @ weight).reshape(*x.shape[:-1], -1)


def project_backward(dy: ndarray, x: ndarray, weight: ndarray) -> tuple[ndarray, ndarray]:
    """dy (..., out) -> dx (..., in), dweight (in, out).

        dx[m, d]      = sum over f of dy[m, f] weight[d, f]    x[m, d] enters each y[m, f]
        dweight[d, f] = sum over m of x[m, d] dy[m, f]         weight[d, f] enters y[m, f] of every row m

    Two products, each as large as the forward one: here is the factor of three. A frozen weight
    needs no dweight: that saves one product, and x need not be kept.
    """
    dx = (_rows(dy) @ weight.T).reshape(x.shape)
    dweight = _rows(x).T @ _rows(dy)
    return dx, dweight


def bias_backward(dy: ndarray) -> ndarray:
    """dy (..., out) -> dbias (out,). y = x + bias adds the bias to every row, so dbias is the sum
    of dy over rows.
    """
    return _rows(dy).sum(0)


def _rows(x: ndarray) -> ndarray:
    """(..., D) -> (M, D): all leading axes as rows of one matrix."""
    return x.reshape(-1, x.shape[-1])


# RMSNorm (Zhang & Sennrich 2019, equation 4)


def rms_norm(x: ndarray, gain: ndarray, eps: float) -> ndarray:
    """x (..., D), gain (D,) -> gain * x * r (..., D), where r = 1 / sqrt(mean(x^2) + eps) of each row."""
    return gain * (x * _inverse_rms(x, eps))


def rms_norm_backward(dy: ndarray, x: ndarray, gain: ndarray, eps: float) -> tuple[ndarray, ndarray]:
    """dy (..., D) -> dx (..., D), dgain (D,).

    Write u = x r, so y = gain u, dgain = sum over rows of dy u, and du = dy gain. x reaches u
    directly and through r, whose derivative by x[j] is -r^3 x[j] / D, therefore

        dx[j] = du[j] r - sum over i of du[i] x[i] r^3 x[j] / D = r (du[j] - u[j] mean(du u)).

    The second term removes du's part along x: a longer x changes nothing in y.
    """
    r = _inverse_rms(x, eps)
    u = x * r
    du = dy * gain
    dx = r * (du - u * np.mean(du * u, axis=-1, keepdims=True))
    return dx, _rows(dy * u).sum(0)


def _inverse_rms(x: ndarray, eps: float) -> ndarray:
    return 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


# Rotary positions (Su et al. 2021, equation 15)


def rope_tables(cfg: ModelConfig, positions: ndarray, dtype: np.dtype) -> tuple[ndarray, ndarray]:
    """positions (B, T) -> cos, sin (B, T, 1, H / 2) of the angle by which each pair of a head
    turns.

    Pair i turns by theta ** (-2 i / H) a position. Llama 3 (2407.21783, section 3.4.1) and YaRN
    (2309.00071, section 3.4) stretch this to a longer context: slow pairs turn `factor` times
    slower, pairs that turn often within the original context stay as they are, and those between
    are blended. YaRN makes cos and sin larger too, and with them attention's scores.
    """
    half = cfg.head_dim // 2
    pairs = np.arange(half, dtype=dtype)
    speed = cfg.rope_theta ** (-pairs / half)
    size = 1.0
    scaling = cfg.rope_scaling
    if scaling is not None:
        if isinstance(scaling, YarnScaling):
            size = scaling.attention_factor
            first, last = scaling.blended_pairs(cfg.head_dim, cfg.rope_theta)
            fast = (last - pairs) / (last - first)
        else:
            turns = scaling.original_context * speed / (2 * math.pi)
            fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        fast = np.clip(fast, 0, 1)
        speed = speed * (fast + (1 - fast) / scaling.factor)
    angles = positions[..., None, None].astype(dtype) * speed
    return size * np.cos(angles), size * np.sin(angles)


def rope(x: ndarray, cos: ndarray, sin: ndarray) -> ndarray:
    """x (B, T, N, H) -> (B, T, N, H), each pair (x[i], x[i + H / 2]) rotated by its angle, as in
    Hugging Face's files.
    """
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_backward(dy: ndarray, cos: ndarray, sin: ndarray) -> ndarray:
    """dy (B, T, N, H) -> dx (B, T, N, H).

    For a pair, y = R x with R = [[cos, -sin], [sin, cos]], so dx = R^T dy, and R^T turns the other
    way.
    """
    return rope(dy, cos, -sin)


# Grouped-query attention. The G = N / K query heads of one key head are G * T rows of one product,
# which in the backward pass also sums over the group for dk and dv.


def group_heads(x: ndarray, K: int) -> ndarray:
    """x (B, T, N, H) -> (B, K, G T, H); for keys and values (B, T, K, H) -> (B, K, T, H), as G is 1."""
    B, T, N, H = x.shape
    moved = x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    # a copy of its own, whatever G is
    return np.ascontiguousarray(moved).reshape(B, K, N // K * T, H)


def ungroup_heads(x: ndarray, T: int) -> ndarray:
    """(B, K, G T, H) -> (B, T, N, H): the inverse of `group_heads`, and its backward."""
    B, K, rows, H = x.shape
    return x.reshape(B, K, rows // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, K * (rows // T), H)


def causal_mask(segments: ndarray | None, T: int) -> ndarray:
    """Returns (1 or B, 1, 1, T, T), True where query t may attend to key s: s <= t, in the same of
    `segments` (B, T).
    """
    causal = np.tri(T, dtype=bool)[None, None, None]
    if segments is None:
        return causal
    return causal & (segments[:, :, None] == segments[:, None])[:, None, None]


def attention_weights(q: ndarray, k: ndarray, mask: ndarray) -> ndarray:
    """q (B, K, G T, H), k (B, K, T, H) -> P (B, K, G T, T), each row the softmax of S = q k^T /
    sqrt(H) within the mask.

    Outside the mask a score is minus infinity, whose exponential is 0.
    """
    scores = q @ k.swapaxes(-1, -2)
    scores *= q.shape[-1] ** -0.5
    T = k.shape[2]
    np.copyto(scores.reshape(*k.shape[:2], -1, T, T), -np.inf, where=~mask)
    return _softmax(scores)


def attention_weights_backward(dp: ndarray, p: ndarray, q: ndarray, k: ndarray) -> tuple[ndarray, ndarray]:
    """dp (B, K, G T, T) -> dq (B, K, G T, H), dk (B, K, T, H).

    The softmax of a row is P[i] = exp(S[i]) / sum over j of exp(S[j]). The derivative of P[j] by
    S[i] is P[j] ([i = j] - P[i]), as raising S[i] raises P[i] and lowers all others, therefore

        dS[i] = sum over j of dP[j] P[j] ([i = j] - P[i]) = P[i] (dP[i] - sum over j of P[j] dP[j]).

    It needs P and not S, and no mask: outside it P is 0, and so is dS. The product S has two
    backward products: dq = dS k / sqrt(H), dk = dS^T q / sqrt(H).
    """
    ds = p * (dp - np.vecdot(p, dp)[..., None])
    ds *= q.shape[-1] ** -0.5
    return ds @ k, ds.swapaxes(-1, -2) @ q


def weighted_values(p: ndarray, v: ndarray) -> ndarray:
    """P (B, K, G T, T), v (B, K, T, H) -> (B, K, G T, H): P v, the values weighted by attention."""
    return p @ v


def weighted_values_backward(dy: ndarray, p: ndarray, v: ndarray) -> tuple[ndarray, ndarray]:
    """dy (B, K, G T, H) -> dp (B, K, G T, T), dv (B, K, T, H): dp = dy v^T, dv = P^T dy."""
    return dy @ v.swapaxes(-1, -2), p.swapaxes(-1, -2) @ dy


def _softmax(x: ndarray) -> ndarray:
    """In place, along the last axis. Less a row's largest, no exponential overflows, and the
    quotient is the same.
    """
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


# SwiGLU (Shazeer 2020, equation 6)


def swiglu(gate: ndarray, up: ndarray) -> ndarray:
    """gate, up (..., F) -> silu(gate) * up (..., F), where silu(x) = x sigmoid(x)."""
    return gate * _sigmoid(gate) * up


def swiglu_backward(dy: ndarray, gate: ndarray, up: ndarray) -> tuple[ndarray, ndarray]:
    """dy (..., F) -> dgate, dup (..., F).

    With s = sigmoid(gate), whose derivative is s (1 - s), that of gate s is s + gate s (1 - s):

        dgate = dy up s (1 + gate (1 - s)),  dup = dy gate s.
    """
    s = _sigmoid(gate)
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


def _sigmoid(x: ndarray) -> ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # 1 / (1 + exp(-x)) without its overflow


# Cross-entropy


def cross_entropy(logits: ndarray, targets: ndarray, mask: ndarray) -> float:
    """logits (B, T, V), targets (B, T), mask (B, T) -> mean nats over the targets that count; 0
    when none does.

    Nats of one target: -log softmax(logits)[target] = log sum exp(logits) - logits[target].
    """
    logits = logits[mask]
    targets = targets[mask]
    largest = logits.max(axis=-1, keepdims=True)
    whole = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
    picked = np.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return float((whole - picked).sum()) / max(len(targets), 1)


def cross_entropy_backward(logits: ndarray, targets: ndarray, mask: ndarray) -> ndarray:
    """Returns dlogits (B, T, V). The backward pass starts here, so there is no dy.

    The derivative of log sum exp(z) by z[i] is exp(z[i]) / sum exp(z), the softmax; that of
    -z[target] is -1 at the target:

        dlogits = (softmax(logits) - [i = target]) / number of targets that count

    and 0 where the mask is False: what the model predicted less what is true.
    """
    dlogits = np.zeros_like(logits)
    p = _softmax(logits[mask])
    p[np.arange(len(p)), targets[mask]] -= 1
    dlogits[mask] = p / max(len(p), 1)
    return dlogits

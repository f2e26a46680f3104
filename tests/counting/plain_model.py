"""The model written as plainly as it can be, and a counter of the matrix products in the gradient of it.

An oracle for the formulas: nothing here knows them. The counter reads the program that differentiation makes, throws
away what no result needs, and adds up 2 · (size of the result) · (size of the contraction) over its products.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from engine.counting.flops import Trained, leaf_shapes
from engine.model.config import ModelConfig


def shapes(cfg: ModelConfig, trained: Trained) -> tuple[dict, dict]:
    """(learning, resting) leaves by path, as shapes; a LoRA pair is `path.a` and `path.b`."""
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in leaf_shapes(cfg).items()}
    learning = {path: leaf for path, leaf in leaves.items() if path in trained.weights}
    for path in trained.adapted:
        rows, columns = leaves[path].shape
        learning[path + ".a"] = jax.ShapeDtypeStruct((rows, trained.rank), jnp.float32)
        learning[path + ".b"] = jax.ShapeDtypeStruct((trained.rank, columns), jnp.float32)
    return learning, {path: leaf for path, leaf in leaves.items() if path not in trained.weights}


def _norm(x, gain):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain


def _project(params, path, x):
    y = x @ params[path]
    if path + ".a" in params:
        y += (x @ params[path + ".a"]) @ params[path + ".b"]
    return y


def _block(cfg, params, prefix, x):
    B, T = x.shape[:2]
    N, K, H = cfg.heads, cfg.kv_heads, cfg.head_dim
    qkv = _project(params, prefix + "qkv", _norm(x, params[prefix + "attn_norm"]))
    if cfg.qkv_bias:
        qkv += params[prefix + "qkv_bias"]
    q, k, v = jnp.split(qkv, [N * H, (N + K) * H], -1)
    q, k, v = q.reshape(B, T, K, N // K, H), k.reshape(B, T, K, H), v.reshape(B, T, K, H)
    if cfg.qk_norm:
        q, k = _norm(q, params[prefix + "q_norm"]), _norm(k, params[prefix + "k_norm"])
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
    scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
    o = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v).reshape(B, T, N * H)
    x += _project(params, prefix + "out", o)
    gate, up = jnp.split(_project(params, prefix + "gate_up", _norm(x, params[prefix + "mlp_norm"])), 2, -1)
    return x + _project(params, prefix + "down", jax.nn.silu(gate) * up)


def logits(cfg, params, tokens, remat="none"):
    """tokens (B, T) -> logits (B, T, V)."""
    x = params["embed"][tokens]
    for layer in range(cfg.layers):
        prefix = f"blocks/{layer}/"

        def block(mine, x, prefix=prefix):
            return _block(cfg, mine, prefix, x)

        mine = {path: leaf for path, leaf in params.items() if path.startswith(prefix)}
        x = (jax.checkpoint(block) if remat == "block" else block)(mine, x)
    return _norm(x, params["norm"]) @ (params["embed"].T if cfg.tied else params["head"])


def _inner(value) -> Iterator:
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _inner(item)


def _products(jaxpr) -> int:
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            count += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        count += times * sum(_products(inner) for value in equation.params.values() for inner in _inner(value))
    return count


def count_products(function, *arguments) -> int:
    """Operations in the products of `function`, dead code not counted."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _products(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def count_step(cfg: ModelConfig, trained: Trained, batch: int, tokens: int, remat: str) -> int:
    """Operations in the products of a loss and its gradient by what learns."""
    data = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)

    def loss(learning, resting, data):
        table = jax.nn.log_softmax(logits(cfg, learning | resting, data, remat))
        return -jnp.take_along_axis(table, data[..., None], -1).mean()

    return count_products(jax.value_and_grad(loss), *shapes(cfg, trained), data)

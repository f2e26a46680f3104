"""The model written as plainly as it can be, and the products in its gradient as the walker counts them.

An oracle for the formulas: nothing here knows them. And the shapes on which programs are traced.
"""

import functools

import jax
import jax.numpy as jnp

from engine.counting.jaxpr import jaxpr_cost
from engine.counting.params import leaf_shapes
from engine.counting.trainable_paths import (
    TrainablePaths,
    all_trainable,
    bottom_frozen,
    head_only,
    lora_only,
    target_shapes,
    top_frozen,
)
from engine.model.cache.contiguous import make_cache
from engine.model.config import LoraConfig, ModelConfig
from engine.model.transformer import init_params
from engine.text.batch import Batch


def shaped(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def params_of(cfg):
    return jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))


def batch_of(rows, tokens):
    numbers = shaped(rows, tokens)
    return Batch(numbers, numbers, shaped(rows, tokens, dtype=bool), numbers)


def cache_of(cfg, slots, capacity):
    return jax.eval_shape(lambda: make_cache(cfg, slots, capacity))


def shapes(cfg: ModelConfig, paths: TrainablePaths) -> tuple[dict, dict]:
    """(learning, resting) leaves by path, as shapes; the LoRA pair of a target is `target.a` and `target.b`."""
    leaves = {path: shaped(*shape, dtype=jnp.float32) for path, shape in leaf_shapes(cfg).items()}
    learning = {path: leaf for path, leaf in leaves.items() if path in paths.weights}
    for path in paths.adapted:
        rows, columns = target_shapes(cfg)[path]
        learning[path + ".a"] = shaped(rows, paths.rank, dtype=jnp.float32)
        learning[path + ".b"] = shaped(paths.rank, columns, dtype=jnp.float32)
    return learning, {path: leaf for path, leaf in leaves.items() if path not in paths.weights}


def _norm(x, gain):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain


def _project(params, path, x):
    y = x @ params[path]
    return y + (x @ params[path + ".a"]) @ params[path + ".b"] if path + ".a" in params else y


def _block(cfg, params, prefix, x):
    B, T = x.shape[:2]
    N, K, H = cfg.heads, cfg.kv_heads, cfg.head_dim
    h = _norm(x, params[prefix + "attn_norm"])
    bias = lambda name: params[f"{prefix}{name}_bias"] if cfg.qkv_bias else 0
    q, k, v = (_project(params, prefix + name, h) + bias(name) for name in "qkv")
    q, k, v = q.reshape(B, T, K, N // K, H), k.reshape(B, T, K, H), v.reshape(B, T, K, H)
    if cfg.qk_norm:
        q, k = _norm(q, params[prefix + "q_norm"]), _norm(k, params[prefix + "k_norm"])
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
    scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
    o = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v).reshape(B, T, N * H)
    x += _project(params, prefix + "out", o)
    h = _norm(x, params[prefix + "mlp_norm"])
    gate, up = (_project(params, prefix + name, h) for name in ("gate", "up"))
    return x + _project(params, prefix + "down", jax.nn.silu(gate) * up)


def logits(cfg, params, tokens, remat="none"):
    """tokens (B, T) -> logits (B, T, V)."""
    x = params["embed"][tokens]
    for layer in range(cfg.layers):
        prefix = f"blocks/{layer}/"

        def block(leaves, x, prefix=prefix):
            return _block(cfg, leaves, prefix, x)

        leaves = {path: leaf for path, leaf in params.items() if path.startswith(prefix)}
        x = (jax.checkpoint(block) if remat == "block" else block)(leaves, x)
    return _norm(x, params["norm"]) @ (params["embed"].T if cfg.tied else params["head"])


def count_step(cfg: ModelConfig, paths: TrainablePaths, batch: int, tokens: int, remat: str) -> int:
    """Operations in the products of a loss and its gradient by what learns."""
    data = shaped(batch, tokens)

    def loss(learning, resting, data):
        table = jax.nn.log_softmax(logits(cfg, learning | resting, data, remat))
        return -jnp.take_along_axis(table, data[..., None], -1).mean()

    loss = jax.checkpoint(loss) if remat == "full" else loss
    return jaxpr_cost(jax.value_and_grad(loss), *shapes(cfg, paths), data).matmul


def modes(cfg: ModelConfig) -> dict[str, TrainablePaths]:
    """Ways of training, one for every branch of the formulas."""
    of = lambda select: TrainablePaths(frozenset(filter(select, leaf_shapes(cfg))))
    lora = lambda rank, *targets: lora_only(cfg, LoraConfig(rank, targets=targets) if targets else LoraConfig(rank))
    return {
        "everything": all_trainable(cfg),
        "bottom frozen": bottom_frozen(cfg, 1),
        "all blocks frozen": bottom_frozen(cfg, cfg.layers),
        "top frozen": top_frozen(cfg, 1),
        "lookup only": top_frozen(cfg, cfg.layers),
        "last layer": bottom_frozen(cfg, cfg.layers - 1),
        "last block alone": of(lambda path: path.startswith(f"blocks/{cfg.layers - 1}/")),
        "norms": of(lambda path: path.endswith("norm")),
        "head only": head_only(cfg),
        "lora": lora(5),
        "lora on v and down": lora(3, "v", "down"),
        "lora on down": lora(3, "down"),
        "lora on gate": lora(3, "gate"),
        "lora on q and up": lora(2, "q", "up"),
        "one lora, high up": TrainablePaths(frozenset(), frozenset({f"blocks/{cfg.layers - 1}/out"}), 2),
    }

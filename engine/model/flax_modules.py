"""The transformer in Flax Linen, as a thin shell: a module names and shapes its parameters, `apply` is a pure function of them.

No other file imports flax.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.mesh import layout
from engine.model import backward, layers
from engine.model.attention import attention, causal_attention
from engine.model.cache.segmented import SegmentedLayer
from engine.model.config import ModelConfig
from engine.model.weights.matmul import lookup, norm_and_project, project, swiglu_and_project

# A tied embedding is also the head, whose logits start at this, lower for a small vocabulary. A tied
# 4 x 256 reaches 2.31 bits per byte after 500 steps of 1,024 tokens with the first SwiGLU random, 2.32
# with all so, and with none 2.39 (an embedding of 1 / D) or 2.47 (a small last gain).
TIED_STD = 0.3
# An untied embedding starts as large as what blocks add.
EMBED_STD = 0.5
Rotary = tuple[Array, Array]
Cached = tuple[Array, Array, Array]  # one layer's k and v (B, K, S, H), and each row's length (B,)


def write_rows(cached: Array, new: Array, start: Array) -> Array:
    """Writes new (B, K, T, H) into cached (B, K, S, H) at start (B,)."""

    def write_row(row: Array, value: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice(row, value, (0, at, 0))

    return jax.vmap(write_row)(cached, new.astype(cached.dtype), start)


def matrix(module: nn.Module, name: str, init: Any, shape: tuple[int, int]) -> Any:
    """Returns a module's weight, of any kind; makes it at initialisation. Raises ValueError for
    another shape.

    Flax would compare the shapes of a leaf's arrays, not that of the matrix it stands for.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    leaf: Any = module.get_variable("params", name)
    if tuple(leaf.shape) != shape:
        raise ValueError(f"The parameter {name} should be {shape}, and is {tuple(leaf.shape)}.")
    return leaf


class Block(nn.Module):
    """x (B, T, D) -> (B, T, D), float32: attention, then SwiGLU, each added to the residual stream.

    `mlp_scale` is the size of what SwiGLU adds at the start: by default nothing.
    """

    cfg: ModelConfig
    mlp_scale: float = 0.0

    @nn.compact
    def __call__(self, x: Array, rotary: Rotary, segments: Array | None, cached: Cached | None):
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        # In a scan XLA would cut what the backward pass keeps along all axes, and then gather it
        # whole: twice the traffic.
        x = layout.shard_rows(x)
        with jax.named_scope("attention"):
            queries = cfg.heads * cfg.head_dim
            keys = cfg.kv_heads * cfg.head_dim
            q, k, v = self.norm_and_project(x, "attn_norm", "qkv", {"q": queries, "k": keys, "v": keys})
            mixed, cached = self.attention(q, k, v, rotary, segments, cached)
            x = x + project(
                mixed, self.weight("out", cfg.heads * cfg.head_dim, cfg.width, scale=0.0), jnp.float32
            )
            x = layout.shard_rows(x)
        with jax.named_scope("mlp"):
            gate, up = self.norm_and_project(x, "mlp_norm", "gate_up", {"gate": cfg.ff, "up": cfg.ff})
            x = x + swiglu_and_project(
                gate, up, self.weight("down", cfg.ff, cfg.width, scale=self.mlp_scale), dtype
            )
            x = layout.shard_rows(x)
        return x, cached

    def norm_and_project(self, x: Array, norm: str, joined: str, columns: dict[str, int]) -> Sequence[Array]:
        """x (B, T, D) -> its product, once normalised, with each weight: (B, T, columns), in the
        compute dtype.

        Where `join_projections` has joined the weights for inference, it is cut out of one product.
        """
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        gain = self.gain(norm, cfg.width)
        if self.has_variable("params", joined):
            weight = self.weight(joined, cfg.width, sum(columns.values()))
            (whole,) = norm_and_project(x, gain, [weight], cfg.eps, dtype)
            return jnp.split(whole, np.cumsum([*columns.values()])[:-1].tolist(), axis=-1)
        return norm_and_project(
            x, gain, [self.weight(name, cfg.width, n) for name, n in columns.items()], cfg.eps, dtype
        )

    def attention(
        self, q: Array, k: Array, v: Array, rotary: Rotary, segments: Array | None, cached: Cached | None
    ):
        """q (B, T, N * H), k and v (B, T, K * H) -> (B, T, N * H), and the layer's cache with this
        call's keys and values.
        """
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        q, k, v = (self.heads(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        q = backward.rope(q, *rotary, cfg.head_dim**-0.5, dtype)  # with the scores' factor
        k = backward.rope(k, *rotary, 1.0, dtype)
        if isinstance(cached, SegmentedLayer):
            return cached.attend(q, k, v)
        if cached is not None:
            return self.cached_attention(q, k, v, cached)
        return causal_attention(q, k, v, segments), None

    def cached_attention(self, q: Array, k: Array, v: Array, cached: Cached):
        """Writes this call's keys and values after each row's length, then attends to all of the row."""
        keys, values, length = cached
        keys = write_rows(keys, k.transpose(0, 2, 1, 3), length)
        values = write_rows(values, v.transpose(0, 2, 1, 3), length)
        # (B, T): the cache index of each query's own key
        last = length[:, None] + jnp.arange(q.shape[1])
        mask = jnp.arange(keys.shape[2]) <= last[:, :, None]
        # 0 times a stale NaN is NaN, so masked values are cleared first.
        seen = mask[:, -1, None, :, None]
        return attention(q, keys, jnp.where(seen, values, 0), mask), (keys, values, length)

    def heads(self, name: str, x: Array) -> Array:
        """x (B, T, N * H) -> (B, T, N, H), of queries, keys or values, with a bias and normalised
        where the model has that.
        """
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        if cfg.qkv_bias:
            x = x + self.param(f"{name}_bias", nn.initializers.zeros, x.shape[-1:]).astype(dtype)
        x = x.reshape(*x.shape[:2], -1, cfg.head_dim)
        if not cfg.qk_norm or name == "v":
            return x
        return backward.rms_norm(x, self.gain(f"{name}_norm", cfg.head_dim), cfg.eps, dtype)

    def gain(self, name: str, size: int) -> Array:
        return self.param(name, nn.initializers.ones, (size,))

    def weight(self, name: str, rows: int, columns: int, scale: float = 1.0) -> Any:
        """(rows, columns), normal with variance 1 / rows; `scale` 0 for what a block adds, which
        starts as the identity.
        """
        init = nn.initializers.normal(scale * rows**-0.5) if scale else nn.initializers.zeros
        return matrix(self, name, init, (rows, columns))


class BlockStack(nn.Module):
    """All L blocks in turn, named '0' to 'L - 1'."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Array, rotary: Rotary, segments: Array | None, cache: Any):
        cfg = self.cfg
        if cache is not None:
            # Unrolled: a scan over a stacked cache copies it whole at every step. One block is
            # traced and inlined L times; calls that are left to XLA would make the program slower.
            @jax.jit(inline=True)
            def block(params: Any, x: Array, cached: Any) -> Any:
                return Block(cfg, parent=None).apply({"params": params}, x, rotary, segments, cached)

            written = []
            for i in range(cfg.layers):
                x, cached = block(self.variables["params"][str(i)], x, cache.layer(i))
                written.append(cached)
            return x, cache.with_layers(written)

        def run(params, x):
            return Block(cfg, parent=None).apply({"params": params}, x, rotary, segments, None)[0]

        if self.is_initializing():
            for i in range(cfg.layers):
                x, _ = Block(cfg, mlp_scale=float(cfg.tied and i == 0), name=str(i))(
                    x, rotary, segments, None
                )
            return x, None
        if cfg.remat == "block":
            run = jax.checkpoint(run)
        # traced once, and inlined L times: the same program in two thirds of the time
        run = jax.jit(run, inline=True)
        params = [self.variables["params"][str(i)] for i in range(cfg.layers)]
        if cfg.scan:

            def stack(*leaves: Array) -> Array:
                return jnp.stack(leaves)

            def run_next(x: Array, block: Any) -> tuple[Array, None]:
                return run(block, x), None

            return jax.lax.scan(run_next, x, jax.tree.map(stack, *params))[0], None
        for block in params:
            x = run(block, x)
        return x, None


class Transformer(nn.Module):
    """tokens, positions (B, T) int32 -> what the last norm takes (B, T, D) float32, and the cache."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens, positions, segments=None, cache=None):
        cfg = self.cfg
        # 256 tokens at TIED_STD start more than 1% from ln 256 for every fourth key, and are 0.04
        # bits per byte ahead later.
        std = min(TIED_STD, 0.011 * cfg.vocab**0.5) * cfg.width**-0.5 if cfg.tied else EMBED_STD
        embed = matrix(self, "embed", nn.initializers.normal(std), (cfg.vocab, cfg.width))
        with jax.named_scope("embed"):
            x = layout.look_up(lookup, embed, tokens)
        x, cache = BlockStack(cfg, name="blocks")(x, layers.rope_tables(cfg, positions), segments, cache)
        self.param("norm", nn.initializers.ones, (cfg.width,))
        if not cfg.tied:
            matrix(self, "head", nn.initializers.zeros, (cfg.width, cfg.vocab))
        return x, cache

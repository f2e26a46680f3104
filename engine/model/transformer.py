"""The transformer: (params, tokens) -> logits, the one function that training and inference share.

Flax Linen is used as a thin shell: a module names and shapes its parameters, `apply` is a pure function of them. This
is the only file that imports flax.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from engine.model import layers
from engine.model.cache import segmented
from engine.model.cache.contiguous import KVCache, write
from engine.model.config import ModelConfig
from engine.model.ops import ops
from engine.model.paths import stack
from engine.model.weights.matmul import lookup, project, project_two, unembed

Params = dict[str, Any]

# A tied table is also the head, whose logits must start small; a table of its own starts as large as what blocks add.
TIED_STD, EMBED_STD = 0.02, 0.5
Rotary = tuple[Array, Array]
Cached = tuple[Array, Array, Array]  # one layer's k and v (B, K, S, H), and each row's length (B,)


def matrix(module: nn.Module, name: str, init: Any, shape: tuple[int, int]) -> Any:
    """The parameter `name` of a module: drawn while the model is made, else the leaf that is there, of whatever kind.

    Flax would compare shapes by how a leaf's arrays lie; a leaf says itself what matrix it stands for.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    leaf: Any = module.get_variable("params", name)
    if tuple(leaf.shape) != shape:
        raise ValueError(f"The parameter {name} should be {shape}, and is {tuple(leaf.shape)}.")
    return leaf


class Block(nn.Module):
    """x (B, T, D) float32 -> (B, T, D) float32: attention, then SwiGLU, each added to the residual stream."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Array, rotary: Rotary, segments: Array | None, cached: Cached | None):
        cfg, math, dtype = self.cfg, ops(), jnp.dtype(self.cfg.dtype)
        with jax.named_scope("attention"):
            h = math.rms_norm(x, self.gain("attn_norm", cfg.width), cfg.eps, dtype)
            mixed, cached = self.attention(h, rotary, segments, cached)
            x = x + project(mixed, self.weight("out", cfg.heads * cfg.head_dim, cfg.width, scale=0.0), jnp.float32)
        with jax.named_scope("mlp"):
            h = math.rms_norm(x, self.gain("mlp_norm", cfg.width), cfg.eps, dtype)
            gate, up = project_two(h, self.weight("gate_up", cfg.width, 2 * cfg.ff), dtype)
            hidden = math.swiglu(gate, up, dtype)
            x = x + project(hidden, self.weight("down", cfg.ff, cfg.width, scale=0.0), jnp.float32)
        return x, cached

    def attention(self, h: Array, rotary: Rotary, segments: Array | None, cached: Cached | None):
        """h (B, T, D) -> (B, T, N * H), and the layer's cache with this call's keys and values."""
        cfg, math, dtype = self.cfg, ops(), jnp.dtype(self.cfg.dtype)
        B, T, _ = h.shape
        qkv = project(h, self.weight("qkv", cfg.width, cfg.qkv_width), dtype)
        if cfg.qkv_bias:
            qkv = qkv + self.param("qkv_bias", nn.initializers.zeros, (cfg.qkv_width,)).astype(dtype)
        qkv = qkv.reshape(B, T, cfg.heads + 2 * cfg.kv_heads, cfg.head_dim)
        qk, v = jnp.split(qkv, [cfg.heads + cfg.kv_heads], axis=2)
        if cfg.qk_norm:
            # The rotation reads each number twice; without the barrier XLA would compute the norm twice as well.
            qk = jax.lax.optimization_barrier(math.rms_norm(qk, self.head_gains(), cfg.eps, dtype))
        scale = jnp.where(jnp.arange(qk.shape[2]) < cfg.heads, cfg.head_dim**-0.5, 1.0)  # the scores' factor, on the queries
        q, k = jnp.split(math.rope(qk, scale, *rotary, dtype), [cfg.heads], axis=2)
        if isinstance(cached, segmented.SegmentedLayer):
            return segmented.attention(q, k, v, cached)
        if cached is not None:
            return self.cached_attention(q, k, v, cached)
        return math.causal_attention(q, k, v, segments), None

    def head_gains(self) -> Array:
        """The gains of the query and the key norm, once for each head: (N + K, H)."""
        cfg = self.cfg
        q, k = self.gain("q_norm", cfg.head_dim), self.gain("k_norm", cfg.head_dim)
        return jnp.concatenate([jnp.tile(q, (cfg.heads, 1)), jnp.tile(k, (cfg.kv_heads, 1))])

    def cached_attention(self, q: Array, k: Array, v: Array, cached: Cached):
        """Writes this call's keys and values behind each row's length and attends over what the row then holds."""
        keys, values, length = cached
        keys = write(keys, k.transpose(0, 2, 1, 3), length)
        values = write(values, v.transpose(0, 2, 1, 3), length)
        last = length[:, None] + jnp.arange(q.shape[1])  # (B, T): the cache index of each query's own key
        mask = jnp.arange(keys.shape[2]) <= last[:, :, None]
        # A weight of 0 does not silence a stale NaN, so what no query of this call may see is cleared first.
        seen = mask[:, -1, None, :, None]
        return ops().attention(q, keys, jnp.where(seen, values, 0), mask), (keys, values, length)

    def gain(self, name: str, size: int) -> Array:
        return self.param(name, nn.initializers.ones, (size,))

    def weight(self, name: str, rows: int, columns: int, scale: float = 1.0) -> Any:
        """(rows, columns), normal with variance 1 / rows; `scale` 0 for what a block adds, so it starts as identity."""
        return matrix(self, name, nn.initializers.normal(scale * rows**-0.5), (rows, columns))


class Blocks(nn.Module):
    """All L blocks in turn, named '0' to 'L - 1'."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Array, rotary: Rotary, segments: Array | None, cache: KVCache | None):
        cfg = self.cfg
        if cache is not None:
            # Unrolled, one array a layer: a scan over a stacked cache copies it whole at every step. The blocks are alike,
            # so one is traced and put in place L times; a call of it that is left to XLA would make the program slower.
            one = functools.partial(jax.jit, inline=True)(
                lambda params, x, cached: Block(cfg, parent=None).apply({"params": params}, x, rotary, segments, cached)
            )
            written = []
            for i in range(cfg.layers):
                x, cached = one(self.variables["params"][str(i)], x, cache.layer(i))
                written.append(cached)
            return x, cache.with_layers(written)

        def run(params, x):
            return Block(cfg, parent=None).apply({"params": params}, x, rotary, segments, None)[0]

        if self.is_initializing():
            for i in range(cfg.layers):
                x, _ = Block(cfg, name=str(i))(x, rotary, segments, None)
            return x, None
        if cfg.remat == "block":
            run = jax.checkpoint(run)
        params = [self.variables["params"][str(i)] for i in range(cfg.layers)]
        if cfg.scan:
            return jax.lax.scan(lambda x, block: (run(block, x), None), x, stack(params))[0], None
        for block in params:
            x = run(block, x)
        return x, None


class Transformer(nn.Module):
    """tokens, positions (B, T) int32 -> logits (B, T, V) float32 (or what the head would read), and the cache."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens, positions, segments=None, cache=None, head: bool = True):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        embed = self.param("embed", nn.initializers.normal(TIED_STD if cfg.tied else EMBED_STD), (cfg.vocab, cfg.width))
        with jax.named_scope("embed"):
            x = lookup(embed, tokens)
        x, cache = Blocks(cfg, name="blocks")(x, layers.rope_tables(cfg, positions), segments, cache)
        x = ops().rms_norm(x, self.param("norm", nn.initializers.ones, (cfg.width,)), cfg.eps, dtype)
        if not cfg.tied:
            weight = matrix(self, "head", nn.initializers.zeros, (cfg.width, cfg.vocab))
        if not head:
            return x, cache
        with jax.named_scope("head"):
            logits = unembed(x, embed, jnp.float32) if cfg.tied else project(x, weight, jnp.float32)
        return logits, cache


def init_params(cfg: ModelConfig, key: Array) -> Params:
    """Random float32 weights: each block starts as identity and an untied head at zero, so the first loss is ln V."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Transformer(cfg).init(key, tokens, tokens)["params"]


def forward(
    cfg: ModelConfig, params: Params, tokens: Array, positions: Array, cache: Any = None, segments: Array | None = None
) -> tuple[Array, Any]:
    """tokens, positions (B, T) int32 -> logits (B, T, V) float32 and the cache with these T tokens' keys and values.

    Without a cache, token t sees tokens 0..t of its own row (and segment). With one, it also sees what the cache holds;
    `cache.length` is returned as it came, for the caller knows how many of the T tokens were real. `cache` is a KVCache
    or None, and what is returned is the same.
    """
    return Transformer(cfg).apply({"params": params}, tokens, positions, segments, cache)


def hidden_states(
    cfg: ModelConfig, params: Params, tokens: Array, positions: Array, cache: Any = None, segments: Array | None = None
) -> tuple[Array, Any]:
    """As `forward`, but for the head: what it would multiply, (B, T, D) in the compute dtype, and the cache.

    For whoever wants the logits of a few positions, or of a part of the vocabulary: `logits_of` makes them.
    """
    return Transformer(cfg).apply({"params": params}, tokens, positions, segments, cache, head=False)


def logits_of(cfg: ModelConfig, params: Params, hidden: Array) -> Array:
    """hidden (..., D) -> logits (..., V) float32: the head alone, tied or not."""
    if cfg.tied:
        return unembed(hidden, params["embed"], jnp.float32)
    return project(hidden, params["head"], jnp.float32)

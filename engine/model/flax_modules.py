"""The transformer in Flax Linen, as a thin shell: a module names and shapes its parameters, `apply` is a pure function of them.

No other file imports flax.
"""

from collections.abc import Callable, Mapping, Sequence
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

# A tied embedding is also the head. This is the standard deviation of its first logits, lower for a
# small vocabulary. A tied 4 x 256 reaches 2.31 bits per byte after 500 steps of 1,024 tokens with the
# first SwiGLU random, 2.32 with all so, and with none 2.39 (an embedding of 1 / D) or 2.47 (a small
# last gain).
TIED_STD = 0.3
# That standard deviation is at most this times the square root of the vocabulary, so that the first
# loss is within 1% of ln V for every key: it is lower for fewer than 744 tokens. 256 tokens at TIED_STD
# start further from ln 256 for every fourth key, and are 0.04 bits per byte ahead later.
TIED_STD_PER_ROOT_VOCAB = 0.011
# An untied embedding starts as large as what blocks add.
EMBED_STD = 0.5
Rotary = tuple[Array, Array]
Cached = tuple[Array, Array, Array]  # one layer's k and v (B, K, S, H), and each row's length (B,)


def embedding_std(cfg: ModelConfig) -> float:
    """Returns the standard deviation of the embedding's first numbers."""
    if not cfg.tied:
        return EMBED_STD
    std_of_logits = min(TIED_STD, TIED_STD_PER_ROOT_VOCAB * cfg.vocab**0.5)
    return std_of_logits * cfg.width**-0.5


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
            q, k, v = self.project_normed(x, "attn_norm", "qkv", {"q": queries, "k": keys, "v": keys})
            mixed, cached = self.attend(q, k, v, rotary, segments, cached)
            out = self.weight("out", queries, cfg.width, scale=0.0)
            x = x + project(mixed, out, jnp.float32)
            x = layout.shard_rows(x)
        with jax.named_scope("mlp"):
            gate, up = self.project_normed(x, "mlp_norm", "gate_up", {"gate": cfg.ff, "up": cfg.ff})
            down = self.weight("down", cfg.ff, cfg.width, scale=self.mlp_scale)
            x = x + swiglu_and_project(gate, up, down, dtype)
            x = layout.shard_rows(x)
        return x, cached

    def project_normed(self, x: Array, norm: str, joined: str, columns: dict[str, int]) -> Sequence[Array]:
        """x (B, T, D) -> its product, once normalised, with each weight: (B, T, columns), in the
        compute dtype. `columns` names the weights, and says how many columns each has.

        Where `join_projections` has joined the weights for inference under the name `joined`, it is
        cut out of one product.
        """
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        gain = self.gain(norm, cfg.width)
        if self.has_variable("params", joined):
            weight = self.weight(joined, cfg.width, sum(columns.values()))
            (whole,) = norm_and_project(x, gain, [weight], cfg.eps, dtype)
            cuts = np.cumsum([*columns.values()])[:-1].tolist()
            return jnp.split(whole, cuts, axis=-1)
        weights = [self.weight(name, cfg.width, count) for name, count in columns.items()]
        return norm_and_project(x, gain, weights, cfg.eps, dtype)

    def attend(
        self, q: Array, k: Array, v: Array, rotary: Rotary, segments: Array | None, cached: Cached | None
    ):
        """q (B, T, N * H), k and v (B, T, K * H) -> (B, T, N * H), and the layer's cache with this
        call's keys and values.
        """
        cfg = self.cfg
        dtype = jnp.dtype(cfg.dtype)
        q = self.split_heads("q", q)
        k = self.split_heads("k", k)
        v = self.split_heads("v", v)
        q = backward.rope(q, *rotary, cfg.head_dim**-0.5, dtype)  # with the scores' factor
        k = backward.rope(k, *rotary, 1.0, dtype)
        if isinstance(cached, SegmentedLayer):
            return cached.attend(q, k, v)
        if cached is not None:
            return self.attend_cached(q, k, v, cached)
        return causal_attention(q, k, v, segments), None

    def attend_cached(self, q: Array, k: Array, v: Array, cached: Cached):
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

    def split_heads(self, name: str, x: Array) -> Array:
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
    """x (B, T, D) -> (B, T, D) after all L blocks in turn, and the cache with this call's keys and
    values. Parameters are named by their block, '0' to 'L - 1'.

    The blocks are submodules only while parameters are made. Afterwards they are not: a pure function
    can be jitted once and inlined L times.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Array, rotary: Rotary, segments: Array | None, cache: Any):
        cfg = self.cfg
        if self.is_initializing():
            for i in range(cfg.layers):
                mlp_scale = float(cfg.tied and i == 0)
                x, _ = Block(cfg, mlp_scale=mlp_scale, name=str(i))(x, rotary, segments, None)
            return x, None
        params = self.variables["params"]
        if cache is None:
            return run_uncached(cfg, params, x, rotary, segments), None
        return run_cached(cfg, params, x, rotary, segments, cache)


def run_uncached(
    cfg: ModelConfig, params: Mapping[str, Any], x: Array, rotary: Rotary, segments: Array | None
) -> Array:
    """x (B, T, D) -> (B, T, D) after all blocks, whose parameters are params["0"], params["1"], and so on."""

    def run_block(block_params: Any, x: Array) -> Array:
        return Block(cfg, parent=None).apply({"params": block_params}, x, rotary, segments, None)[0]

    if cfg.remat == "block":
        run_block = jax.checkpoint(run_block)
    # traced once, and inlined L times: the same program in two thirds of the time
    run_block = jax.jit(run_block, inline=True)
    params_by_block = [params[str(i)] for i in range(cfg.layers)]
    if cfg.scan:
        return scan_blocks(run_block, params_by_block, x)
    for block_params in params_by_block:
        x = run_block(block_params, x)
    return x


def scan_blocks(run_block: Callable[[Any, Array], Array], params_by_block: list[Any], x: Array) -> Array:
    """Returns x after all blocks, by one compiled loop over their stacked parameters."""

    def stack(*leaves: Array) -> Array:
        return jnp.stack(leaves)

    def run_next(x: Array, block_params: Any) -> tuple[Array, None]:
        return run_block(block_params, x), None

    x, _ = jax.lax.scan(run_next, x, jax.tree.map(stack, *params_by_block))
    return x


def run_cached(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    x: Array,
    rotary: Rotary,
    segments: Array | None,
    cache: Any,
) -> tuple[Array, Any]:
    """Returns x as `run_uncached`, and the cache with this call's keys and values."""

    # Unrolled: a scan over a stacked cache copies it whole at every step. One block is traced and
    # inlined L times; calls that are left to XLA would make the program slower.
    @jax.jit(inline=True)
    def run_block(block_params: Any, x: Array, layer: Any) -> Any:
        return Block(cfg, parent=None).apply({"params": block_params}, x, rotary, segments, layer)

    layers_written = []
    for i in range(cfg.layers):
        x, layer = run_block(params[str(i)], x, cache.layer(i))
        layers_written.append(layer)
    return x, cache.with_layers(layers_written)


class Transformer(nn.Module):
    """tokens, positions (B, T) int32 -> what the last norm takes (B, T, D) float32, and the cache."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens, positions, segments=None, cache=None):
        cfg = self.cfg
        init = nn.initializers.normal(embedding_std(cfg))
        embed = matrix(self, "embed", init, (cfg.vocab, cfg.width))
        with jax.named_scope("embed"):
            x = layout.look_up(lookup, embed, tokens)
        x, cache = BlockStack(cfg, name="blocks")(x, layers.rope_tables(cfg, positions), segments, cache)
        self.param("norm", nn.initializers.ones, (cfg.width,))
        if not cfg.tied:
            matrix(self, "head", nn.initializers.zeros, (cfg.width, cfg.vocab))
        return x, cache

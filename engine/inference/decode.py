"""Prefill and decode for rows that start together, in one contiguous KV cache: the readable reference.

`engine.Engine`, which serves many requests, samples the same tokens in float32; in bfloat16 it sums
in another order. The tests compare the two, `bench` times these programs, and a training run writes
its samples by `generate`. They donate the cache, and no parameter.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.inference.request import SamplingParams
from engine.inference.sampling import SamplingArrays, sample, sampling_arrays
from engine.inference.scheduler import STEPS
from engine.mesh import layout
from engine.model.config import ModelConfig
from engine.model.ops import platform
from engine.model.paths import map_paths
from engine.model.transformer import KVCache, Params, forward, hidden_states, logits_of, make_cache
from engine.model.weights.convert import cast_matrices, join_projections
from engine.model.weights.lora import merge_lora
from engine.model.weights.plain import as_weight

CHUNK = 64  # prompt tokens a prefill call


def prepare_params(cfg: ModelConfig, params: Params, whole: bool = True) -> Params:
    """Prepares weights for inference, once: matrices in the compute dtype, adapters merged, those
    of one input side by side.

    A CPU that holds Int8 `whole` gets its integers transposed.
    """
    transposes = whole and platform() == "cpu"

    def to_numpy(_: str, leaf: Any) -> Any:
        if transposes and _is_matrix_of_other_dtype(leaf, cfg.dtype):
            return np.asarray(leaf)  # JAX would cast and join by a program for each shape
        return leaf

    def lay_out(_: str, leaf: Any) -> Any:
        if transposes:
            leaf = as_weight(leaf).for_cpu()
        if isinstance(leaf, np.ndarray):
            return jnp.asarray(leaf)
        return leaf

    def prepare(tree: Params, joins: bool = False) -> Params:
        tree = map_paths(to_numpy, merge_lora(tree, cfg.dtype))
        tree = cast_matrices(tree, cfg.dtype)
        if joins:
            tree = join_projections(tree)
        return map_paths(lay_out, tree)

    # One block after another: what is merged and not yet joined takes no more room than a block.
    blocks = {layer: prepare(block, joins=whole) for layer, block in params["blocks"].items()}
    outside = {name: leaf for name, leaf in params.items() if name != "blocks"}
    return prepare(outside) | {"blocks": blocks}


def _is_matrix_of_other_dtype(leaf: Any, dtype: str) -> bool:
    """Whether a leaf is a matrix of JAX, with values, in another dtype than this."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    return leaf.ndim == 2 and leaf.dtype != dtype


@jax.jit(static_argnames="cfg", donate_argnames="cache")
def prefill(
    cfg: ModelConfig, params: Params, tokens: Array, lengths: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """tokens (B, T) int32, the first lengths (B,) of each row real -> logits (B, V) float32 after
    the last real one, cache.

    T tokens are written after each row's length, which grows by `lengths`. The logits of a row of
    length 0 mean nothing.
    """
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
    hidden, cache = hidden_states(cfg, params, tokens, positions, cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    logits = logits_of(cfg, params, jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    return logits, layout.pin_cache(cache._replace(length=cache.length + lengths))


@jax.jit(static_argnames="cfg", donate_argnames="cache")
def decode_steps(
    cfg: ModelConfig, params: Params, token: Array, cache: KVCache, sampling: SamplingArrays
) -> tuple[Array, KVCache]:
    """token (B,) int32 -> the STEPS tokens that follow, (B, STEPS) int32, and the cache with token
    and all but the last.
    """

    def step(carry: tuple[Array, KVCache], _: None) -> tuple[tuple[Array, KVCache], Array]:
        token, cache = carry
        logits, cache = forward(cfg, params, token[:, None], cache.length[:, None], cache)
        cache = cache._replace(length=cache.length + 1)
        token = sample(logits[:, 0], cache.length, sampling)
        return (token, cache), token

    (_, cache), tokens = jax.lax.scan(step, (token, cache), length=STEPS)
    return tokens.T, layout.pin_cache(cache)


def generate(
    cfg: ModelConfig,
    params: Params,
    prompt: Sequence[int],
    count: int,
    *,
    temperature: float,
    seed: int = 0,
    stop_token_ids: Collection[int] = (),
) -> list[int]:
    """Returns the `count` tokens that follow a prompt, or those before one of `stop_token_ids`.
    params: `prepare_params`'s.
    """
    sampling = sampling_arrays([SamplingParams(temperature=temperature, seed=seed)])
    chunks = [*itertools.batched(prompt[:-1], CHUNK)]  # decoding reads the last token
    capacity = CHUNK * len(chunks) + STEPS * -(-count // STEPS)
    cache = layout.make_sharded_cache(lambda: make_cache(cfg, 1, capacity))
    for chunk in chunks:
        tokens = np.pad(np.array([chunk], np.int32), ((0, 0), (0, CHUNK - len(chunk))))
        _, cache = prefill(cfg, params, tokens, np.array([len(chunk)], np.int32), cache)
    token = np.array(prompt[-1:], np.int32)
    output: list[int] = []
    while len(output) < count and not any(token_id in stop_token_ids for token_id in output):
        following, cache = decode_steps(cfg, params, token, cache, sampling)
        output += following[0].tolist()
        token = following[:, -1]
    before_stop = []
    for token_id in output[:count]:
        if token_id in stop_token_ids:
            break
        before_stop.append(token_id)
    return before_stop

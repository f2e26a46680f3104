"""The rows that run forward only: evaluation, prefill, and decoding for one, for eight and for thirty-two."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.table.products import products_alone
from bench.table.row import Row, compiled
from engine.counting.memory import InferenceMemory, inference_memory
from engine.counting.programs import decode_program, prefill_program, score_program
from engine.counting.traffic import decode_bytes, forward_bytes, prefill_bytes
from engine.inference.decode import CHUNK, MIN_ROWS, STEPS, decode_steps, prefill
from engine.inference.sampling import sampling_arrays
from engine.inference.sampling_params import SamplingParams
from engine.inference.score import score
from engine.model.cache.contiguous import KVCache, make_cache
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.model.transformer import hidden_states, logits_of
from engine.model.weights.int8 import Int8
from engine.text.batch import Batch


def evaluation_row(cfg: ModelConfig, params: Any, batch: Batch) -> Row:
    """Returns the row that scores a batch: the forward pass that all ratios are to."""
    B, T = batch.tokens.shape
    program, cost = compiled(score, (cfg,), params, batch)
    return Row(
        "evaluation forward", "inference", lambda: program(params, batch), lambda: params, tokens=B * T,
        formula=score_program(cfg, B, T), memory=_memory(inference_memory(cfg, B, 0, tokens=T, every_logit=True)),
        moved=forward_bytes(cfg, B, T).total, dtype=cfg.dtype, **cost,
    )  # fmt: skip


def prefill_row(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Row:
    """Returns the row that prefills a batch of prompts, tokens (B, T) int32, CHUNK tokens at a time."""
    B, T = tokens.shape
    T -= T % CHUNK
    pieces = [jnp.asarray(tokens[:, start : start + CHUNK]) for start in range(0, T, CHUNK)]
    lengths = jnp.full((B,), CHUNK, jnp.int32)
    cache = make_cache(cfg, B, T)
    chunks = len(pieces)
    program, cost = compiled(prefill, (cfg,), params, pieces[0], lengths, cache, calls=chunks)

    def run() -> Any:
        nonlocal cache
        cache = cache._replace(length=jnp.zeros((B,), jnp.int32))
        for piece in pieces:
            logits, cache = program(params, piece, lengths, cache)
        return logits

    return Row(
        "prefill", "inference", run, lambda: params, tokens=B * T,
        formula=prefill_program(cfg, B, CHUNK, T) * chunks, memory=_memory(inference_memory(cfg, B, T, tokens=CHUNK)),
        moved=prefill_bytes(cfg, B, CHUNK, T).total * chunks, dtype=cfg.dtype, **cost,
    )  # fmt: skip


def decode_row(
    cfg: ModelConfig, params: Any, requests: int, length: int, *, name: str, series: str | None = None, weights: Any = None
) -> Row:
    """Returns the row that decodes greedily for `requests` streams behind caches of `length` places, STEPS a dispatch.

    A lone request runs in a program of two rows, as it does when it is served. `weights` is what matrices are stored in
    ("int8"), by default the config's dtype.
    """
    rows = max(requests, MIN_ROWS)
    cache = _filled(cfg, rows, length)
    sampling = jax.device_put(sampling_arrays(SamplingParams(temperature=0.0).per_row(rows)))
    token = jnp.zeros((rows,), jnp.int32)
    capacity = cache.k[0].shape[2]
    program, cost = compiled(decode_steps, (cfg,), params, token, cache, sampling, steps=STEPS)

    def run() -> Any:
        nonlocal cache
        fresh = cache._replace(length=jnp.full((rows,), length, jnp.int32))
        tokens, cache = program(params, token, fresh, sampling)
        return tokens

    return Row(
        name, "decode", run, lambda: params, tokens=requests * STEPS,
        formula=decode_program(cfg, rows, capacity, two_digits=two_digits(params)) * STEPS,
        memory=_memory(inference_memory(cfg, rows, capacity, weights=weights)),
        moved=decode_bytes(cfg, rows, capacity, weights=weights).total * STEPS,
        slots=requests, series=series, dtype=weights or cfg.dtype, products=products_alone(cfg, params, rows), **cost,
    )  # fmt: skip


def two_digits(params: Any) -> set[str]:
    """Returns the names of the matrices whose input is multiplied in two digits."""
    leaves = leaf_paths(params).items()
    return {path.rpartition("/")[2] for path, leaf in leaves if isinstance(leaf, Int8) and leaf.activations == "int16"}


def uncached(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Any:
    """Returns a call that makes one more token behind tokens (T,) without a cache: by reading all of them again."""

    def next_token(params: Any, tokens: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = hidden_states(cfg, params, tokens, positions)
        return logits_of(cfg, params, hidden[:, -1:]).argmax(-1)

    rows = jnp.asarray(tokens)[None]
    program = jax.jit(next_token).lower(params, rows).compile()
    return lambda: program(params, rows)


def _filled(cfg: ModelConfig, rows: int, length: int) -> KVCache:
    """Returns a cache of `length` tokens with room for a dispatch: its contents do not matter to its cost."""
    cache = make_cache(cfg, rows, length + STEPS)
    noise = lambda part: tuple(jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(part))
    return KVCache(noise(cache.k), noise(cache.v), jnp.full((rows,), length, jnp.int32))


def _memory(predicted: InferenceMemory) -> dict[str, int]:
    return {"params": predicted.params, "cache": predicted.cache, "activations": predicted.working + predicted.logits}

"""The rows that run forward only: evaluation, prefill, a prompt as it is served, and decoding for one, eight and thirty-two."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench.table.row import Row, compiled
from engine.counting.flops import Flops, Part, prefill_flops
from engine.counting.memory import InferenceMemory, inference_memory
from engine.counting.programs import decode_program, prefill_program, score_program
from engine.counting.traffic import decode_bytes, forward_bytes, prefill_bytes
from engine.inference.decode import CHUNK, MIN_ROWS, STEPS, decode_steps, prefill
from engine.inference.programs import prefill_chunk, read_chunk, write_chunk
from engine.inference.sampling import sampling_arrays
from engine.inference.sampling_params import SamplingParams
from engine.inference.score import score
from engine.inference.slots import CHUNK as SLOT_CHUNK
from engine.model.cache.contiguous import KVCache, make_cache
from engine.model.cache.segmented import make_kv_segments
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.model.transformer import Params, hidden_states, logits_of
from engine.model.weights.int8 import Int8
from engine.model.weights.matmul import project, project_two
from engine.text.batch import Batch

SLOTS = 8  # of the server that a prompt is served by


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
    lengths, cache, chunks = jnp.full((B,), CHUNK, jnp.int32), make_cache(cfg, B, T), len(pieces)
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


def served_rows(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Iterator[Row]:
    """Yields the rows of a prompt, tokens (T,) int32 with T a multiple of 64, in one slot of a server of SLOTS: computed,
    and copied from the prefix cache. Neither samples a token."""
    (T,) = tokens.shape
    size = SLOT_CHUNK if T % SLOT_CHUNK == 0 else 64
    at = [np.int32(start) for start in range(0, T, size)]
    pieces = [jnp.asarray(tokens[None, start : start + size]) for start in at]
    slot = np.int32(SLOTS - 1)
    cache = make_kv_segments(cfg, SLOTS, T, size, "float32" if cfg.dtype == "float32" else "bfloat16")
    S = cache.edges[-1]
    prompt_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) // SLOTS * T // S

    chunks = len(pieces)
    prefill_program, cost = compiled(prefill_chunk, (cfg,), params, cache, pieces[0], slot, at[0], calls=chunks)

    def compute() -> Any:
        nonlocal cache
        for piece, start in zip(pieces, at):
            cache = prefill_program(params, cache, piece, slot, start)
        return cache

    # A chunk meets every place of its slot. Only keys and values are wanted, so the last layer ends with them.
    parts = prefill_flops(cfg, size, attention="full", cached=S - size).parts
    blocks = {name: Part(part.forward // cfg.layers * (cfg.layers - 1)) for name, part in parts.items()}
    formula = Flops(blocks | {"qkv": parts["qkv"], "head": Part()})
    predicted = inference_memory(cfg, SLOTS, S, tokens=size)
    yield Row(
        "chunked prefill into a slot", "inference", compute, lambda: params, tokens=T,
        formula=formula * chunks, dtype=cfg.dtype, **cost,
        memory={"params": predicted.params, "cache": predicted.cache, "activations": predicted.working // SLOTS},
        moved=prefill_bytes(cfg, 1, size, S).total * chunks,
    )  # fmt: skip

    cached = [read_chunk(cache, slot, start, size) for start in at]
    copy_program, cost = compiled(write_chunk, (), cache, cached[0], slot, at[0], calls=chunks)

    def copy() -> Any:
        nonlocal cache
        for chunk, start in zip(cached, at):
            cache = copy_program(cache, chunk, slot, start)
        return cache

    yield Row(
        "prefix-cache hit", "inference", copy, lambda: params, tokens=T, formula=Flops({}),
        memory={"cache": predicted.cache + prompt_bytes // chunks}, moved=2 * prompt_bytes, dtype=cfg.dtype, **cost,
    )  # fmt: skip


def decode_row(cfg: ModelConfig, params: Any, requests: int, length: int, *, name: str, weights: Any = None) -> Row:
    """Returns the row that decodes greedily for `requests` streams behind caches of `length` places, STEPS a dispatch.

    A lone request runs in a program of two rows, as it does when it is served. `weights` is what matrices are stored in
    ("int8"), by default the config's dtype.
    """
    rows = max(requests, MIN_ROWS)
    # Room for a dispatch behind `length` tokens, whose contents do not matter to its cost.
    cache = make_cache(cfg, rows, length + STEPS)
    noise = lambda part: tuple(jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(part))
    cache = KVCache(noise(cache.k), noise(cache.v), jnp.full((rows,), length, jnp.int32))
    sampling = jax.device_put(sampling_arrays(SamplingParams(temperature=0.0).per_row(rows)))
    x = jax.random.normal(jax.random.key(0), (rows, 1, cfg.width), jnp.dtype(cfg.dtype))
    alone = products.lower(cfg, params, x).compile()
    token, capacity = jnp.zeros((rows,), jnp.int32), cache.k[0].shape[2]
    program, cost = compiled(decode_steps, (cfg,), params, token, cache, sampling, steps=STEPS)

    def run() -> Any:
        nonlocal cache
        fresh = cache._replace(length=jnp.full((rows,), length, jnp.int32))
        tokens, cache = program(params, token, fresh, sampling)
        return tokens

    return Row(
        name, "decode", run, lambda: params, tokens=requests * STEPS,
        formula=decode_program(cfg, rows, capacity, int16_activations=int16_activation_matrices(params)) * STEPS,
        memory=_memory(inference_memory(cfg, rows, capacity, int8=bool(weights))),
        moved=decode_bytes(cfg, rows, capacity, int8=bool(weights)).total * STEPS,
        slots=requests, series=weights and f"{weights} weights", dtype=weights or cfg.dtype,
        products=lambda: alone(params, x), **cost,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="cfg")
def products(cfg: ModelConfig, params: Params, x: Array) -> Array:
    """Multiplies x (B, 1, D) by every matrix of the model in turn, STEPS times as in a dispatch of decoding: its products with
    weights and nothing else, no cache, no attention, no sampling.

    Products of few rows run far below what square ones reach; how far depends on the weights' shapes and type. So their
    time is measured beside the step's: what a step takes longer goes to its caches and to all that lies between products.
    """
    dtype = jnp.dtype(cfg.dtype)

    def step(x: Array, _: None) -> tuple[Array, None]:
        for layer in range(cfg.layers):
            leaf = params["blocks"][str(layer)]
            mixed = project(x, leaf["qkv"], dtype)[..., : cfg.heads * cfg.head_dim]
            gate, up = project_two(project(mixed, leaf["out"], dtype), leaf["gate_up"], dtype)
            x = project(gate + up, leaf["down"], dtype)
        # The next step waits for these logits, else nobody would make them.
        return x + 0 * logits_of(cfg, params, x).max().astype(dtype), None

    return jax.lax.scan(step, x, length=STEPS)[0]


def int16_activation_matrices(params: Any) -> set[str]:
    """Returns the names of the Int8 matrices whose activations are 16 bits wide, multiplied as two int8 digits."""
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


def _memory(predicted: InferenceMemory) -> dict[str, int]:
    return {"params": predicted.params, "cache": predicted.cache, "activations": predicted.working + predicted.logits}

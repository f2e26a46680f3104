"""What time does not show: whether requests keep apart, whether use changes anything, what int8 costs in exactness."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.table.claims import Observed
from engine.inference.decode import CHUNK, decode_step, decode_steps, prefill
from engine.inference.sampling import sampling_arrays
from engine.inference.sampling_params import SamplingParams
from engine.inference.score import score
from engine.model.cache.contiguous import KVCache, make_cache
from engine.model.config import ModelConfig
from engine.model.transformer import forward
from engine.storage.digest import digest
from engine.text.batch import Batch

SLOTS = 8


def same_alone_and_beside(cfg: ModelConfig, params: Any, length: int) -> bool:
    """Whether a prompt's log-probabilities and greedy tokens are the same bits in each of SLOTS slots, alone and beside
    other requests of any length, in caches of `length` places that others have used."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, cfg.vocab, CHUNK - 5, dtype=np.int32)
    seen = set()
    for slot in range(SLOTS):
        for alone in (True, False):
            tokens = rng.integers(0, cfg.vocab, (SLOTS, CHUNK), dtype=np.int32)
            lengths = np.zeros(SLOTS, np.int32) if alone else rng.integers(1, CHUNK, SLOTS, dtype=np.int32)
            tokens[slot, : len(prompt)], lengths[slot] = prompt, len(prompt)
            seen.add(_answer(cfg, params, tokens, lengths, length, slot))
    return len(seen) == 1


def _answer(cfg: ModelConfig, params: Any, tokens: Any, lengths: Any, length: int, slot: int) -> bytes:
    empty = make_cache(cfg, SLOTS, length)
    used = lambda part: tuple(jax.random.normal(jax.random.key(slot), x.shape, x.dtype) for x in part)
    cache = KVCache(used(empty.k), used(empty.v), empty.length)
    logits, cache = prefill(cfg, params, jnp.asarray(tokens), jnp.asarray(lengths), cache)
    token = logits.argmax(-1).astype(jnp.int32)
    greedy = sampling_arrays(SamplingParams(temperature=0.0).per_row(SLOTS))
    drawn, cache = decode_steps(cfg, params, token, cache, greedy)
    after, _ = decode_step(cfg, params, drawn[:, -1], cache)
    chances = (jax.nn.log_softmax(x, -1)[slot] for x in (logits, after))
    return b"".join(np.asarray(x).tobytes() for x in (drawn[slot], *chances))


def loss_of(cfg: ModelConfig, params: Any, batch: Batch) -> str:
    """Mean nats of a batch, as hex, so that it shows every bit."""
    return (float(score(cfg, params, batch)) / batch.tokens.size).hex()


def moved_logits(cfg: ModelConfig, params: Any, other: Any, batch: Batch) -> float:
    """How far `other`'s logits lie from those of `params`: root mean square, as a share of their spread."""
    run = jax.jit(functools.partial(forward, cfg))
    first, second = (run(weights, batch.tokens[:2], batch.positions[:2])[0] for weights in (params, other))
    return float(jnp.sqrt(jnp.mean((first - second) ** 2)) / jnp.std(first))


def observe(
    cfg: ModelConfig, params: Any, batch: Batch, *, count: int, length: int, before: tuple[str, str], generated: int,
    uncached: tuple[float, int], int8: Any,
) -> Observed:  # fmt: skip
    """All that the claims need beside the rows. `before` is the loss and the digest from before anything was run."""
    return Observed(
        params=count, neighbours=SLOTS - 1, same_bits=same_alone_and_beside(cfg, params, length), generated=generated,
        bits_before=before[0], bits_after=loss_of(cfg, params, batch), digest_before=before[1], digest_after=digest(params),
        uncached_seconds=uncached[0], uncached_tokens=uncached[1],
        bytes_a_weight=jnp.dtype(cfg.dtype).itemsize, int8_worst=moved_logits(cfg, params, int8, batch),
    )  # fmt: skip

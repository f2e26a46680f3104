"""Checks beside the stage table: that XLA adds up, requests do not affect one another, and inference changes no weight.

On a CPU some releases of XLA get a product with a constant wrong, in silence.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.stages.claims import InferenceChecks
from bench.stages.rows import SLOTS, random_cache
from engine.inference.decode import CHUNK, decode_step, decode_steps, prefill
from engine.inference.request import SamplingParams
from engine.inference.sampling import sampling_arrays
from engine.inference.score import score
from engine.model.config import ModelConfig
from engine.model.transformer import forward
from engine.storage.digest import digest
from engine.text.batch import Batch

SHAPE = 5, 60, 60  # smaller ones come out right
EXPRESSION = "jit(sum(x @ full_like(x, 2.5), -1))"
TOLERANCE = 1e-4  # float32 agrees to 1e-6; garbage is memory that nobody wrote
ADVICE = (
    "In JAX code of your own, no product under jit may read a constant made beside it, such as ones or zeros: pass it as an "
    "argument, or through jax.lax.optimization_barrier."
)


def check_arithmetic() -> dict[str, Any]:
    """Returns "adds_up", "relative_error" (None for NaN) and a "sentence" on XLA in this process."""
    error = constant_product_error()
    adds_up, finite = error <= TOLERANCE, math.isfinite(error)
    case = f"{EXPRESSION} of {' x '.join(map(str, SHAPE))} random numbers"
    if adds_up:
        sentence = f"XLA adds up here: {case}, which some releases get wrong on CPUs, agrees with NumPy to {error:.0e}."
    else:
        off = f"off by {error:.0e} times its largest number" if finite else "not a number"
        sentence = f"XLA does not add up here: {case} is {off}. {ADVICE} Thrice's own programs hold no such product."
    return {"adds_up": adds_up, "relative_error": error if finite else None, "sentence": sentence}


def constant_product_error() -> float:
    """Returns the largest difference between XLA's and NumPy's EXPRESSION, as a share of the largest number."""
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    expected = (x.astype(float) @ np.full(SHAPE, 2.5)).sum(-1)
    result = np.asarray(jax.jit(lambda x: jnp.sum(x @ jnp.full_like(x, 2.5), -1))(x), float)
    return float(np.abs(result - expected).max() / np.abs(expected).max())


def check_invariants(
    cfg: ModelConfig, params: Any, int8: Any, batch: Batch, *, length: int, before: tuple[str, str], generated: int
) -> InferenceChecks:
    """Runs the checks after `generated` tokens, with caches of `length` places; `before` is an earlier `model_state`."""
    return InferenceChecks(
        neighbours=SLOTS - 1, same_bits=is_batch_invariant(cfg, params, length), generated=generated, before=before,
        after=model_state(cfg, params, batch), int8_error=logits_error(cfg, params, int8, batch),
    )  # fmt: skip


def model_state(cfg: ModelConfig, params: Any, batch: Batch) -> tuple[str, str]:
    """Returns the mean nats of a batch as hex, which shows every bit, and the digest of the weights."""
    return (float(score(cfg, params, batch)) / batch.tokens.size).hex(), digest(params)


def is_batch_invariant(cfg: ModelConfig, params: Any, length: int) -> bool:
    """Whether a prompt gives the same bits of log-probabilities and greedy tokens in every slot, alone and beside others."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, cfg.vocab, CHUNK - 5, dtype=np.int32)
    answers = set()
    for slot in range(SLOTS):
        for alone in (True, False):
            tokens = rng.integers(0, cfg.vocab, (SLOTS, CHUNK), dtype=np.int32)
            lengths = np.zeros(SLOTS, np.int32) if alone else rng.integers(1, CHUNK, SLOTS, dtype=np.int32)
            tokens[slot, : len(prompt)], lengths[slot] = prompt, len(prompt)
            answers.add(_answer(cfg, params, tokens, lengths, length, slot))
    return len(answers) == 1


def _answer(cfg: ModelConfig, params: Any, tokens: Any, lengths: Any, length: int, slot: int) -> bytes:
    """Returns a slot's greedy tokens and its log-probabilities before and after them, as bytes."""
    cache = random_cache(cfg, SLOTS, length, slot)
    logits, cache = prefill(cfg, params, jnp.asarray(tokens), jnp.asarray(lengths), cache)
    token = logits.argmax(-1).astype(jnp.int32)
    greedy = sampling_arrays(SamplingParams(temperature=0.0).per_row(SLOTS))
    output, cache = decode_steps(cfg, params, token, cache, greedy)
    after, _ = decode_step(cfg, params, output[:, -1], cache)
    logprobs = (jax.nn.log_softmax(x, -1)[slot] for x in (logits, after))
    return b"".join(np.asarray(x).tobytes() for x in (output[slot], *logprobs))


def logits_error(cfg: ModelConfig, params: Any, other: Any, batch: Batch) -> float:
    """Returns the root mean square of `other`'s logits less those of `params`, as a share of the latter's spread."""
    run = jax.jit(functools.partial(forward, cfg))
    first, second = (run(weights, batch.tokens[:2], batch.positions[:2])[0] for weights in (params, other))
    return float(jnp.sqrt(jnp.mean((first - second) ** 2)) / jnp.std(first))

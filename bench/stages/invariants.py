"""Checks that requests do not affect one another and inference changes no weight; measures int8's error in logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.stages.claims import InferenceChecks
from bench.stages.inference_rows import SLOTS, random_cache
from engine.inference.decode import CHUNK, decode_step, decode_steps, prefill
from engine.inference.request import SamplingParams
from engine.inference.sampling import sampling_arrays
from engine.inference.score import score
from engine.model.config import ModelConfig
from engine.model.transformer import forward
from engine.storage.digest import digest
from engine.text.batch import Batch


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

"""Checks beside the stage table: that requests do not affect one another, and how far int8 moves the logits."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.inference.config import EngineConfig
from engine.inference.engine import Engine
from engine.inference.request import Request, SamplingParams
from engine.inference.score import score
from engine.model.config import ModelConfig
from engine.model.transformer import forward
from engine.storage.digest import digest
from engine.text.batch import Batch

SLOTS, NEW = 8, 32  # of the server; tokens of each answer


def model_state(cfg: ModelConfig, params: Any, batch: Batch) -> tuple[str, str]:
    """Returns the mean nats of a batch as hex, which shows every bit, and the digest of the weights."""
    return (float(score(cfg, params, batch)) / batch.tokens.size).hex(), digest(params)


def serve_beside_others(cfg: ModelConfig, params: Any, capacity: int) -> tuple[int, bool]:
    """Returns in how many of SLOTS slots a request beside others gets other tokens, or other bits of log-probabilities, than
    alone; and whether that changed a weight. The engine is the server's, of `params` that are prepared for inference and
    `capacity` tokens a slot."""
    engine = Engine(cfg, params, EngineConfig(SLOTS, capacity, prefix_cache_bytes=10**7))
    prompts = random_prompts(cfg, SLOTS, capacity - NEW)
    others = [Request(tuple(each), SamplingParams(max_tokens=NEW, temperature=0.8, seed=5)) for each in prompts[1:]]
    request = Request(tuple(prompts[0]), SamplingParams(max_tokens=NEW, temperature=0.8, seed=9, logprobs=0))

    def answer(slot: int, beside: Sequence[Request]) -> tuple[Any, ...]:
        """Returns the tokens and log-probabilities of the request, submitted at `slot` among the requests `beside`."""
        ids = [engine.submit(each) for each in (*beside[:slot], request, *beside[slot:])]
        tokens, logprobs = [], []
        while engine.busy:
            for event in engine.step():
                if event.id == ids[slot]:
                    tokens += event.tokens
                    logprobs += [each.logprob for each in event.logprobs]
        return tokens, logprobs

    before, alone = digest(engine.params), answer(0, [])
    changed = sum(answer(slot, others) != alone for slot in range(SLOTS))
    return changed, digest(engine.params) != before


def random_prompts(cfg: ModelConfig, count: int, most: int) -> list[list[int]]:
    """Returns prompts of 5 to `most` - 1 random tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, cfg.vocab, int(rng.integers(5, most))).tolist() for _ in range(count)]


def logits_error(cfg: ModelConfig, params: Any, other: Any, batch: Batch) -> float:
    """Returns the root mean square of `other`'s logits less those of `params`, as a share of the latter's spread."""
    run = jax.jit(functools.partial(forward, cfg))
    first, second = (run(weights, batch.tokens[:2], batch.positions[:2])[0] for weights in (params, other))
    return float(jnp.sqrt(jnp.mean((first - second) ** 2)) / jnp.std(first))

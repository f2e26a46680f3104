"""Inference runs forward only: it never changes a weight, never remembers a request, and no request feels another."""

import functools

import pytest

from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine, complete
from engine.inference.request import SamplingParams
from engine.model.weights.int8 import quantize
from engine.storage.digest import digest
from tests.tiny import lively_params, request_of, tiny_config, tokens_of

CAPACITY, MAX_TOKENS = 64, 11


@functools.cache
def served_model(weights: str):
    """(cfg, params) as they are served; with weights in int8 in bfloat16."""
    cfg = tiny_config(dtype="bfloat16" if weights == "int8" else weights)
    params = lively_params(cfg)
    return cfg, prepare_params(cfg, quantize(params) if weights == "int8" else params)


@pytest.mark.law("forward only", "immutable weights")
@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ("float32", 1),
        ("int8", 3),
        *(pytest.param(*each, marks=pytest.mark.whole) for each in (("bfloat16", 3), ("int8", 1))),
    ],
)
def test_completing_prompts_changes_no_weight_and_remembers_none(weights, rows):
    """As commands and rollouts do: a lone prompt, which repeats itself, and several."""
    cfg, params = served_model(weights)
    before = digest(params)
    texts = [[1, 2, 3, 4] * 4, *(tokens_of(seed, 20 * seed).tolist() for seed in (1, 2))][:rows]
    sampling = SamplingParams(MAX_TOKENS, temperature=0.8, seed=2).per_row(rows)
    first = complete(cfg, params, texts, sampling, CAPACITY)
    others = complete(cfg, params, [texts[0], *[[5, 6]] * (rows - 1)], sampling, CAPACITY)
    assert others[0] == first[0]
    assert complete(cfg, params, texts, sampling, CAPACITY) == first
    assert [len(completion.tokens) for completion in first] == [MAX_TOKENS] * rows
    assert digest(params) == before


@pytest.mark.law("immutable weights", "isolation")
def test_serving_many_changes_no_weight_and_remembers_no_request():
    """All that an engine can do, twice over: prefix-cache hits, draft tokens, penalties,
    cancelling.
    """
    cfg, params = served_model("bfloat16")
    params = prepare_params(cfg, quantize(params))
    before, answers = digest(params), []
    engine = Engine(
        cfg, params, EngineConfig(3, 32, kv_dtype="int8", prefix_cache_bytes=10**6, chunk=16, tail=4)
    )
    for _ in range(2):
        ids = [
            engine.submit(
                request_of(
                    tokens_of(seed % 4, 5 * seed + 1),
                    MAX_TOKENS,
                    temperature=seed % 3,
                    presence_penalty=seed % 2,
                    logit_bias={seed: 1.0},
                    seed=seed,
                    logprobs=seed,
                )
            )
            for seed in range(5)
        ] + [engine.submit(request_of([1, 2, 3, 4] * 3, 20, temperature=0.0))]
        tokens, logprobs = {id: [] for id in ids}, {id: [] for id in ids}
        engine.cancel(ids[1])
        while engine.busy:
            for event in engine.step():
                tokens[event.id] += event.tokens
                logprobs[event.id] += event.logprobs
        answers.append([(tokens[id], logprobs[id]) for id in ids if id != ids[1]])
    assert answers[0] == answers[1]
    assert [len(tokens) for tokens, _ in answers[0]] == [MAX_TOKENS] * 4 + [20]
    assert engine.prefix_cache.bytes > 0
    assert digest(params) == digest(engine.params) == before

"""Inference runs forward only: it never changes a weight, never remembers a request, and no request feels another."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import INFERENCE, QWEN3
from tiny import lively_params, request_of, tiny_config, tokens_of

from engine.inference.decode import decode_step, decode_steps, generate, prefill, prepare_params
from engine.inference.engine import Engine
from engine.inference.request import SamplingParams
from engine.inference.sampling import sampling_arrays
from engine.model.cache.contiguous import KVCache, make_cache
from engine.model.weights.int8 import matmul_rules, quantize
from engine.storage.digest import digest

ROWS, CAPACITY, CHUNK, MAX_TOKENS = 5, 64, 7, 11


@functools.cache
def served_model(weights: str, tied: bool = False):
    """(cfg, params) as they are served; with weights in "int8" (W8A8) or "full" (int8 weights alone) in bfloat16."""
    quantized = weights in ("int8", "full")
    cfg = tiny_config(dtype="bfloat16" if quantized else weights, tied=tied)
    params = lively_params(cfg)
    return cfg, prepare_params(cfg, quantize(params, matmul_rules(params, weights)) if quantized else params)


def samplings(rows: int, **fixed) -> st.SearchStrategy[list[SamplingParams]]:
    """SamplingParams for `rows` rows, each row its own."""
    row = st.builds(
        SamplingParams, max_tokens=st.just(MAX_TOKENS), temperature=st.sampled_from([0.0, 0.7, 1.0, 1.6]),
        top_k=st.sampled_from([0, 1, 5]), top_p=st.sampled_from([0.4, 0.9, 1.0]), min_p=st.sampled_from([0.0, 0.2]),
        seed=st.integers(0, 2**32 - 1), **fixed,
    )  # fmt: skip
    return st.lists(row, min_size=rows, max_size=rows)


STOPS = st.sets(st.integers(0, 40), max_size=1)


def prompts(rows: int, longest: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=longest), min_size=rows, max_size=rows)


def completions(cfg, params, prompts, sampling) -> list[list[int]]:
    out = [[] for _ in prompts]
    for part in generate(cfg, params, prompts, sampling, capacity=CAPACITY):
        out[part.id] += part.tokens
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=10)
@given(prompts(3, CAPACITY - MAX_TOKENS), prompts(3, CAPACITY - 1), samplings(3), samplings(3, stop_token_ids=STOPS))
def test_generating_changes_no_weight_remembers_nothing_and_gives_each_prompt_its_own_completion(
    dtype, request_, between, sampling, other
):
    cfg, params = served_model(dtype)
    before = digest(params)
    first = completions(cfg, params, request_, sampling)
    assert completions(cfg, params, [request_[0], *between[1:]], [sampling[0], *other[1:]])[0] == first[0]
    assert completions(cfg, params, request_, sampling) == first
    assert all(len(completion) == MAX_TOKENS for completion in first)
    assert digest(params) == before


def test_serving_many_changes_no_weight_and_remembers_no_request():
    """All that slots can do, twice over: prefix-cache hits, draft tokens, penalties, cancelling."""
    cfg, params = served_model("bfloat16")
    params = prepare_params(cfg, quantize(params))
    before, answers = digest(params), []
    engine = Engine(cfg, params, slots=3, capacity=32, kv_dtype="int8", chunk=16, tail=4, prefix_cache_bytes=10**6)
    for _ in range(2):
        ids = [
            engine.submit(request_of(
                tokens_of(seed % 4, 5 * seed + 1), MAX_TOKENS, temperature=seed % 3, presence_penalty=seed % 2,
                logit_bias={seed: 1.0}, seed=seed, logprobs=seed,
            ))
            for seed in range(5)
        ] + [engine.submit(request_of([1, 2, 3, 4] * 3, 20, temperature=0.0))]  # fmt: skip
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


def broken_promises(function, arguments) -> list[str]:
    """Which of the ways to change or hand out weights a compiled function takes: it should take none.

    The weights are its second argument, after the static config, and called `params`; what is not read is no parameter
    of the compiled program.
    """
    params = arguments[1]
    lowered = function.lower(*arguments)
    compiled = lowered.compile().as_text()
    aliases = re.search(r"input_output_alias=\{(.*?) \}, ", compiled)
    overwritten = [int(n) for n in re.findall(r": \((\d+), ", aliases[1])] if aliases else []
    # Weights and cache share no shape, and neither does anything else that inference returns.
    returned = {out.shape for out in jax.tree.leaves(lowered.out_info)} & {leaf.shape for leaf in jax.tree.leaves(params)}
    entry = re.search(r"^ENTRY .*?\n\}", compiled, re.MULTILINE | re.DOTALL)[0]
    names = {int(n): name for n, name in re.findall(r' parameter\((\d+)\).*?op_name="(\w+)', entry)}
    assert set(names) == set(range(entry.count(" parameter("))), "a parameter has no name"
    assert set(overwritten) <= set(names)
    assert "params" in names.values()
    return [
        *["donates a weight" for info in jax.tree.leaves(lowered.args_info[0][0]) if info.donated],
        *["overwrites a weight" for place in overwritten if names[place] == "params"],
        *[f"returns something of a weight's shape {shape}" for shape in returned],
    ]


@pytest.mark.parametrize("name", INFERENCE)
def test_no_program_donates_overwrites_or_returns_a_weight(name):
    function, arguments, _ = INFERENCE[name](QWEN3)
    assert broken_promises(function, arguments) == []


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_the_check_sees_a_weight_given_away():
    arguments = INFERENCE["decode_step"](QWEN3).arguments
    plain = decode_step.__wrapped__
    donating = jax.jit(plain, static_argnames="cfg", donate_argnames=("params", "cache"))
    assert "donates a weight" in broken_promises(donating, arguments)

    def returning(cfg, params, token, cache):
        return plain(cfg, params, token, cache), params["head"]

    assert broken_promises(jax.jit(returning, static_argnames="cfg"), arguments) == [
        "returns something of a weight's shape (96, 300)"
    ]

    def updating(cfg, params, token, cache):
        logits, cache = plain(cfg, params, token, cache)
        return logits, cache, jax.tree.map(lambda leaf: leaf + logits.mean(), params)

    updating = jax.jit(updating, static_argnames="cfg", donate_argnames="params")
    assert "overwrites a weight" in broken_promises(updating, arguments)


def dirty_cache(cfg, seed: int) -> KVCache:
    """An empty cache with another request's rubbish in it."""
    rng = np.random.default_rng(seed)
    stale = lambda leaf: jnp.asarray(10 * rng.standard_normal(leaf.shape), leaf.dtype)
    clean = make_cache(cfg, ROWS, CAPACITY)
    return KVCache(*jax.tree.map(stale, (clean.k, clean.v)), clean.length)


def run_rows(cfg, params, prompts, sampling, seed: int):
    """Logits after the prompts (ROWS, V), and the tokens sampled after them (ROWS, 8): two fixed programs, chunk by chunk."""
    cache, after = dirty_cache(cfg, seed), np.zeros((ROWS, cfg.vocab), np.float32)
    for start in range(0, max(map(len, prompts)), CHUNK):
        pieces = [prompt[start : start + CHUNK] for prompt in prompts]
        rng = np.random.default_rng(seed + start)
        tokens = np.array([[*piece, *rng.integers(0, 41, CHUNK - len(piece))] for piece in pieces], np.int32)
        lengths = np.array([len(piece) for piece in pieces], np.int32)
        logits, cache = prefill(cfg, params, tokens, lengths, cache)
        after = np.where((lengths > 0)[:, None], logits, after)
    sampled, _ = decode_steps(cfg, params, after.argmax(-1).astype(np.int32), cache, sampling)
    return after, np.asarray(sampled)


@pytest.mark.parametrize(
    ("weights", "tied", "temperature"),
    [
        ("float32", False, 0.0), ("float32", False, 1.0), ("bfloat16", False, 0.0), ("bfloat16", False, 1.0),
        ("int8", False, 0.0), ("int8", True, 0.0), ("full", False, 0.0), ("full", True, 0.0),
    ],
)  # fmt: skip
def test_neighbours_padding_and_slot_do_not_matter_to_the_bit(weights, tied, temperature):
    """One program of fixed shape: a request's logits and tokens are the same alone, in company, and in any slot."""
    cfg, params = served_model(weights, tied)
    prompt = tokens_of(0, 10).tolist()

    def run(slot: int, seed: int, alone: bool):
        rng = np.random.default_rng(seed)
        neighbours = [[0] if alone else tokens_of(seed + n, int(rng.integers(1, 30))).tolist() for n in range(ROWS)]
        sampling = SamplingParams(temperature=0.0 if alone else 1.3, top_k=0 if alone else 3, seed=seed).per_row(ROWS)
        sampling[slot] = SamplingParams(temperature=temperature, top_p=0.9, seed=77)
        neighbours[slot] = prompt
        logits, sampled = run_rows(cfg, params, neighbours, sampling_arrays(sampling), seed)
        return logits[slot].tobytes(), sampled[slot].tobytes()

    results = {run(slot, 100 * slot + alone, alone) for slot in range(ROWS) for alone in (True, False)}
    assert len(results) == 1

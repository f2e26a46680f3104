"""Adapters: rows with different ones share a batch, each with the bits that it has alone, and near its merged model."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidField
from engine.inference.config import MIN_ROWS, EngineConfig
from engine.inference.constraints import ForcedTokens
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.request import Adapter, Request, SamplingParams
from engine.model.paths import leaf_paths, map_paths, merge, unflatten
from engine.model.weights.lora import LoRA, to_dense
from engine.storage.digest import digest
from tests.inference.engine_requests import (
    AS_SERVED,
    REQUESTS,
    Log,
    attends_by_xla,
    complete,
    make_engine,
    served_model,
    text,
    to_blocks,
)
from tests.tiny import lively_params, normal, request_of, tiny_config

COUNT, RANK = 4, 3
# weights and KV cache, as AS_SERVED: what a server without the kernels in C has
IN_INT8 = "int8/bfloat16"


@functools.cache
def adapter(dtype: str, number: int):
    """An adapter of all matrices in every layer, or of a few, whose rank is below the stacks' for
    an odd number.
    """
    cfg, seed, rank = served_model(dtype)[0], number, RANK - number % 2
    names = {2: ("q", "down"), 3: ("v", "up", "out")}.get(number)
    return unflatten(
        {
            f"blocks/{layer}/{name}": LoRA(
                None,
                normal(seed, rows, rank) * rows**-0.5,
                normal(seed + layer, rank, columns),
                0.3 + 0.1 * seed,
            )
            for layer in range(cfg.layers)
            for name, (rows, columns) in cfg.matrices.items()
            if not names or name in names
        }
    )


def adapted_engine(dtype: str, places: dict[int, int], **options) -> Engine:
    """An engine in whose stacks adapter n lies at places[n]."""
    engine = make_engine(dtype, adapters=COUNT, adapter_rank=RANK, **options)
    # as `warm` finds
    engine.few_rows = MIN_ROWS if engine.config.backend.in_c and dtype == AS_SERVED else 0
    for number, index in places.items():
        engine.runner.put_adapter(index, adapter(dtype, number))
    return engine


def with_adapter(request: Request, number: int | None, index: int) -> Request:
    return dataclasses.replace(
        request, adapter=None if number is None else Adapter(f"digest {number}", index)
    )


@functools.cache
def alone(dtype: str, request: int, number: int | None, by_xla: bool = False):
    places = {} if number is None else {number: 1}
    (completion,) = complete(
        adapted_engine(dtype, places, speculate=False), [with_adapter(REQUESTS[request], number, 1)]
    )
    return completion


choices = st.lists(
    st.tuples(st.sampled_from(range(len(REQUESTS))), st.sampled_from([None, *range(COUNT)])),
    min_size=1,
    max_size=8,
)


@pytest.mark.law("batch invariance")
@pytest.mark.parametrize("dtype", [AS_SERVED, IN_INT8, pytest.param("float32", marks=pytest.mark.night)])
@settings(max_examples=12, deadline=None)
@given(choices, st.permutations(range(1, COUNT + 1)), st.booleans(), st.sampled_from([0, 10**6]))
def test_rows_with_different_adapters_have_the_bits_that_each_has_alone(
    dtype, rows, places, speculate, cache
):
    """Wherever their adapters lie in the stacks; with draft tokens, grammars and the prefix cache."""
    engine = adapted_engine(dtype, dict(enumerate(places)), speculate=speculate, prefix_cache_bytes=cache)
    requests = [
        with_adapter(REQUESTS[n], number, 0 if number is None else places[number]) for n, number in rows
    ]
    assert complete(engine, requests) == [alone(dtype, n, number) for n, number in rows]


@pytest.fixture(scope="class")
def by_xla():
    with attends_by_xla():
        yield


@pytest.mark.whole
@pytest.mark.usefixtures("by_xla")
class TestWithoutTheKernelsInC:
    @pytest.mark.parametrize("dtype", [AS_SERVED, IN_INT8])
    @settings(max_examples=6, deadline=None)
    @given(choices, st.permutations(range(1, COUNT + 1)))
    def test_rows_with_different_adapters_have_the_bits_that_each_has_alone(self, dtype, rows, places):
        engine = adapted_engine(dtype, dict(enumerate(places)))
        requests = [
            with_adapter(REQUESTS[n], number, 0 if number is None else places[number]) for n, number in rows
        ]
        assert complete(engine, requests) == [alone(dtype, n, number, True) for n, number in rows]


def scores(engine: Engine, number: int | None = None) -> np.ndarray:
    """Log-probabilities of given tokens, nats, with the adapter that lies at 2."""
    sampling = SamplingParams(max_tokens=20, temperature=0.0, logprobs=0)
    log = Log(engine)
    id = log.submit(
        with_adapter(Request(text(5, 30), sampling, constraint=ForcedTokens(text(6, 20))), number, 2)
    )
    log.drain()
    return np.array([logprob.logprob for event in log.events[id] for logprob in event.logprobs])


@pytest.mark.parametrize(
    "whole", [True, pytest.param(False, marks=pytest.mark.whole)]
)  # queries, keys and values side by side, or apart
@pytest.mark.parametrize("number", range(COUNT))
def test_a_row_is_its_merged_model_up_to_rounding(number, whole):
    """In float32: one is computed by the pair, the other by the merged matrix."""
    cfg, params = served_model("float32")[0], lively_params(tiny_config(), 3)
    expected = scores(
        make_engine("float32", params=prepare_params(cfg, merge(adapter("float32", number), params)))
    )
    assert np.abs(expected - scores(make_engine("float32"))).max() > 0.1
    actual = scores(adapted_engine("float32", {number: 2}, params=prepare_params(cfg, params, whole)), number)
    np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.whole
@pytest.mark.parametrize("by_xla", [False, True])
def test_rows_over_blocks_of_several_kinds_are_their_merged_models(by_xla):
    """Up to rounding of what they read, and of pairs to int8: blocks of queries and values that
    cannot be joined.
    """
    cfg, config = served_model(AS_SERVED)[0], EngineConfig(weights="file")
    plain = lively_params(cfg, 3)
    blocks = map_paths(
        lambda path, leaf: to_blocks("down" if path.endswith(("/v", "/up")) else path, leaf), plain
    )
    apart = config.prepare_params(cfg, blocks)
    assert {"blocks/0/v", "blocks/1/up"} <= leaf_paths(apart).keys()
    with attends_by_xla() if by_xla else contextlib.nullcontext():
        for number in range(COUNT):
            pairs = adapter(AS_SERVED, number)
            rounded = merge(pairs, map_paths(lambda _, leaf: to_dense(leaf), blocks))
            expected = scores(make_engine(AS_SERVED, params=prepare_params(cfg, rounded)))
            engine = adapted_engine(AS_SERVED, {number: 2}, params=apart)
            base, actual = scores(engine), scores(engine, number)
            assert np.abs(actual - expected).max() < 0.25 < 1.5 < np.abs(base - expected).max()


def test_an_adapter_comes_and_goes_while_others_are_read(count_compiles):
    """In new arrays: nothing is compiled, the base is the same to the bit, and requests under way
    go on with their own.
    """
    engine = make_engine(IN_INT8, adapters=COUNT, adapter_rank=RANK, prefix_cache_bytes=10**6)
    engine.warm()
    before = digest(engine.params)
    engine.runner.put_adapter(1, adapter(IN_INT8, 0))
    log, count = Log(engine), len(REQUESTS)
    ids = [log.submit(with_adapter(REQUESTS[n], [None, 0][n % 2], 1)) for n in range(6)]
    count_compiles.clear()
    for number in (1, 2, 3, 2, 1):
        log.step()
        stacks = engine.runner.stacks
        held = digest(stacks)
        engine.runner.put_adapter(2, adapter(IN_INT8, number))
        assert digest(stacks) == held != digest(engine.runner.stacks)
        ids.append(log.submit(with_adapter(REQUESTS[count - 1 - number], number, 2)))
        while log.events[ids[-1]] == [] or ids[-1] not in log.finished:
            log.step()
    log.drain()
    assert count_compiles == []
    expected = [alone(IN_INT8, n, [None, 0][n % 2]) for n in range(6)]
    expected += [alone(IN_INT8, count - 1 - number, number) for number in (1, 2, 3, 2, 1)]
    assert [log.completion(id) for id in ids] == expected
    assert digest(engine.params) == before


def test_the_prefix_cache_holds_a_prompt_for_each_adapter():
    """A prefix that was computed with one is never read with another, nor without, and is found
    again by its digest.
    """
    engine = adapted_engine("float32", {0: 1, 1: 2}, prefix_cache_bytes=10**6)
    prompt = request_of(text(5, 40), 3, temperature=0.0)

    def cached(number: int | None, index: int) -> int:
        log = Log(engine)
        id = log.submit(with_adapter(prompt, number, index))
        log.drain()
        return log.events[id][-1].cached_tokens

    assert [cached(None, 0), cached(0, 1), cached(1, 2)] == [0, 0, 0]
    engine.runner.put_adapter(3, adapter("float32", 1))
    assert min(cached(None, 0), cached(0, 1), cached(1, 3)) > 30


def test_tails_are_compared_with_an_adapter(monkeypatch):
    """A prefix of a chunk is read from the cache only where the bits are the same with an adapter
    too.
    """
    engine = adapted_engine("float32", {0: 1}, prefix_cache_bytes=10**6)
    stacks, indexes = engine.runner.stacks, []
    prefill = engine.runner.prefill
    monkeypatch.setattr(
        engine.runner, "prefill", lambda *values: indexes.append(values[-1]) or prefill(*values)
    )
    engine.warm()
    assert engine.runner.stacks is stacks
    assert set(indexes) == {1}


def test_an_engine_without_adapters_has_no_stacks_and_takes_no_request_for_one():
    engine = make_engine("float32")
    assert engine.runner.stacks is None
    with pytest.raises(InvalidField, match="0 adapters"):
        engine.submit(with_adapter(REQUESTS[0], 0, 1))

"""Adapters: rows with different ones share a batch, each with the bits that it has alone, and near its merged model."""

import dataclasses
import functools

import numpy as np
import pytest
from engine_requests import REQUESTS, Log, attends_by_xla, complete, make_engine, served_model, text
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import lively_params, normal, request_of, tiny_config

from engine.errors import InvalidField, UserError
from engine.inference.constraints import ForcedTokens
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.request import Adapter, Request, SamplingParams
from engine.model.paths import merge, unflatten
from engine.model.weights.lora import LoRA
from engine.model.weights.stacked_lora import make_stacks, with_stacks
from engine.storage.digest import digest

COUNT, RANK = 4, 3
IN_INT8 = "int8/bfloat16"  # weights and KV cache: what a server with adapters has


@functools.cache
def adapter(seed: int, *names: str):
    """An adapter of these matrices in every layer, or of all, whose rank is below the stacks' for an odd seed."""
    cfg, rank = tiny_config(), RANK - seed % 2
    return unflatten(
        {
            f"blocks/{layer}/{name}": LoRA(
                None, normal(seed, rows, rank) * rows**-0.5, normal(seed + layer, rank, columns), 0.3 + 0.1 * seed
            )
            for layer in range(cfg.layers)
            for name, (rows, columns) in cfg.matrices.items()
            if not names or name in names
        }
    )


ADAPTERS = [adapter(0), adapter(1), adapter(2, "q", "down"), adapter(3, "v", "up", "out")]


def adapted_engine(dtype: str, places: dict[int, int], **options) -> Engine:
    """An engine in whose stacks adapter n lies at places[n]."""
    engine = make_engine(dtype, adapters=COUNT, adapter_rank=RANK, **options)
    for number, index in places.items():
        engine.runner.put_adapter(index, ADAPTERS[number])
    return engine


def with_adapter(request: Request, number: int | None, index: int) -> Request:
    return dataclasses.replace(request, adapter=None if number is None else Adapter(f"digest {number}", index))


@functools.cache
def alone(dtype: str, request: int, number: int | None, by_xla: bool = False):
    places = {} if number is None else {number: 1}
    (completion,) = complete(adapted_engine(dtype, places, speculate=False), [with_adapter(REQUESTS[request], number, 1)])
    return completion


def test_weights_apart_are_refused_and_no_adapter_is_left_out():
    cfg = tiny_config()
    apart = prepare_params(cfg, lively_params(cfg), whole=False)
    with pytest.raises(UserError, match="blocks/0/gate_up in one piece"):
        with_stacks(cfg, apart, make_stacks(cfg, COUNT, RANK), np.zeros(1, np.int32))


choices = st.lists(
    st.tuples(st.sampled_from(range(len(REQUESTS))), st.sampled_from([None, *range(COUNT)])), min_size=1, max_size=8
)


@pytest.mark.parametrize("dtype", [IN_INT8, pytest.param("float32", marks=pytest.mark.night)])
@settings(max_examples=12, deadline=None)
@given(choices, st.permutations(range(1, COUNT + 1)), st.booleans(), st.sampled_from([0, 10**6]))
def test_rows_with_different_adapters_have_the_bits_that_each_has_alone(dtype, rows, places, speculate, cache):
    """Wherever their adapters lie in the stacks; with draft tokens, grammars and the prefix cache."""
    engine = adapted_engine(dtype, dict(enumerate(places)), speculate=speculate, prefix_cache_bytes=cache)
    requests = [with_adapter(REQUESTS[n], number, 0 if number is None else places[number]) for n, number in rows]
    assert complete(engine, requests) == [alone(dtype, n, number) for n, number in rows]


@pytest.fixture(scope="class")
def by_xla():
    with attends_by_xla():
        yield


@pytest.mark.usefixtures("by_xla")
class TestWithoutTheKernelsInC:
    @settings(max_examples=6, deadline=None)
    @given(choices, st.permutations(range(1, COUNT + 1)))
    def test_rows_with_different_adapters_have_the_bits_that_each_has_alone(self, rows, places):
        engine = adapted_engine(IN_INT8, dict(enumerate(places)))
        requests = [with_adapter(REQUESTS[n], number, 0 if number is None else places[number]) for n, number in rows]
        assert complete(engine, requests) == [alone(IN_INT8, n, number, True) for n, number in rows]


@pytest.mark.parametrize("number", range(COUNT))
def test_a_row_is_its_merged_model_up_to_rounding(number):
    """Log-probabilities of given tokens, nats, in float32: one is computed by the pair, the other by the merged matrix."""
    cfg, _ = served_model("float32")
    merged = prepare_params(cfg, merge(ADAPTERS[number], lively_params(cfg, 3)))
    sampling = SamplingParams(max_tokens=20, temperature=0.0, logprobs=0)
    scored = Request(text(5, 30), sampling, constraint=ForcedTokens(text(6, 20)))
    of = lambda events: np.array([logprob.logprob for event in events for logprob in event.logprobs])

    def scores(engine, request):
        log = Log(engine)
        id = log.submit(request)
        log.drain()
        return of(log.events[id])

    expected = scores(make_engine("float32", params=merged), scored)
    assert np.abs(expected - scores(make_engine("float32"), scored)).max() > 0.1
    actual = scores(adapted_engine("float32", {number: 2}), with_adapter(scored, number, 2))
    np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=0)


def test_an_adapter_comes_and_goes_while_others_are_read(count_compiles):
    """In new arrays: nothing is compiled, the base is the same to the bit, and requests under way go on with their own."""
    engine = make_engine(IN_INT8, adapters=COUNT, adapter_rank=RANK, prefix_cache_bytes=10**6)
    engine.warm()
    before = digest(engine.params)
    engine.runner.put_adapter(1, ADAPTERS[0])
    log, count = Log(engine), len(REQUESTS)
    ids = [log.submit(with_adapter(REQUESTS[n], [None, 0][n % 2], 1)) for n in range(6)]
    count_compiles.clear()
    for number in (1, 2, 3, 2, 1):
        log.step()
        stacks = engine.runner.stacks
        held = digest(stacks)
        engine.runner.put_adapter(2, ADAPTERS[number])
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
    """A prefix that was computed with one is never read with another, nor without, and is found again by its digest."""
    engine = adapted_engine("float32", {0: 1, 1: 2}, prefix_cache_bytes=10**6)
    prompt = request_of(text(5, 40), 3, temperature=0.0)

    def cached(number: int | None, index: int) -> int:
        log = Log(engine)
        id = log.submit(with_adapter(prompt, number, index))
        log.drain()
        return log.events[id][-1].cached_tokens

    assert [cached(None, 0), cached(0, 1), cached(1, 2)] == [0, 0, 0]
    engine.runner.put_adapter(3, ADAPTERS[1])
    assert min(cached(None, 0), cached(0, 1), cached(1, 3)) > 30


def test_tails_are_compared_with_an_adapter(monkeypatch):
    """A prefix of a chunk is read from the cache only where the bits are the same with an adapter too."""
    engine = adapted_engine("float32", {0: 1}, prefix_cache_bytes=10**6)
    stacks, indexes = engine.runner.stacks, []
    prefill = engine.runner.prefill
    monkeypatch.setattr(engine.runner, "prefill", lambda *values: indexes.append(values[-1]) or prefill(*values))
    engine.warm()
    assert engine.runner.stacks is stacks
    assert set(indexes) == {1}


def test_an_engine_without_adapters_has_no_stacks_and_takes_no_request_for_one():
    engine = make_engine("float32")
    assert engine.runner.stacks is None
    with pytest.raises(InvalidField, match="0 adapters"):
        engine.submit(with_adapter(REQUESTS[0], 0, 1))

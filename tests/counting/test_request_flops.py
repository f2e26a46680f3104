"""What a request's tokens cost: the formulas of a whole pass, token by token, and what the program of a chunk computes."""

import functools

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.counting.flops import Flops, forward_flops, prefill_flops, train_flops
from engine.counting.jaxpr import jaxpr_cost
from engine.counting.request_flops import RequestFlops, prefilled_parts, training_step_flops
from engine.inference.backend import ByXla
from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.runner import empty_cache, empty_stacks, idle_programs
from tests.counting.shapes_only import params_of
from tests.tiny import tiny_config

RANK = 3
CFG = tiny_config(layers=3)
FLOPS = RequestFlops(CFG, RANK)
KINDS = ("decoded", "prefilled", "embedded")


@pytest.mark.parametrize("position", [0, 1, 22])
def test_a_token_costs_a_forward_pass_over_the_keys_that_it_meets(position):
    keys = position + 1
    assert FLOPS.decoded(position, keys) == forward_flops(CFG, keys, attention="full").total
    parts = prefill_flops(CFG, 1, attention="full", cached=position).parts
    assert FLOPS.prefilled(position, keys) == Flops(prefilled_parts(CFG, parts)).total
    assert FLOPS.embedded(position, keys) == Flops(parts).total - parts["head"].total


@given(st.sampled_from(KINDS), st.lists(st.integers(0, 50), min_size=3, max_size=3), st.booleans())
def test_however_a_text_is_cut_its_tokens_cost_the_same(kind, positions, is_adapted):
    start, middle, stop = sorted(positions)
    of_tokens = functools.partial(getattr(FLOPS, kind), is_adapted=is_adapted)
    assert of_tokens(start, middle) + of_tokens(middle, stop) == of_tokens(start, stop)
    assert of_tokens(start, stop) == sum(of_tokens(each, each + 1) for each in range(start, stop))


@pytest.mark.parametrize("adapters", [0, 2])
@pytest.mark.parametrize("embeds", [False, True])
def test_a_chunk_costs_what_its_program_computes(adapters, embeds):
    """XLA attends to all places of a slot, as a token does that is the last of them."""
    size, capacity = 16, 48
    config = EngineConfig(
        slots=3,
        capacity=capacity,
        chunk=size,
        tail=size,
        kv_dtype="float32",
        adapters=adapters,
        adapter_rank=RANK,
        embeds=embeds,
        backend=ByXla(),
    )
    params = jax.eval_shape(functools.partial(prepare_params, CFG), params_of(CFG))
    segments, counts = jax.eval_shape(lambda: empty_cache(CFG, config))
    stacks = jax.eval_shape(lambda: empty_stacks(params, config))
    program = idle_programs(CFG, config, params, segments, counts, stacks)["prefill_chunk"]
    cfg, *arguments = program.arguments
    counted = jaxpr_cost(functools.partial(program.function, cfg), *arguments).matmul
    of_tokens = FLOPS.embedded if embeds else FLOPS.prefilled
    assert counted == size * of_tokens(capacity - 1, capacity, adapters > 0)


def test_a_training_step_is_three_forward_passes_over_its_tokens():
    step = training_step_flops(CFG)
    assert step == 2048 * train_flops(CFG, 256, attention="full").total
    assert step == 3 * 2048 * forward_flops(CFG, 256, attention="full").total

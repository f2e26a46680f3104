"""Int8 weights in inference: which leaves, how far off, and the logits stay near."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import lively_params, positions_of, sampling_of, tiny_config, tokens_of

from engine.errors import UserError
from engine.inference.decode import decode_step, for_inference
from engine.inference.penalties import PenaltyArrays, make_token_counts
from engine.inference.programs import decode_steps as decode_slots
from engine.inference.quantize import every_product, quantize, round_trips
from engine.model.cache.contiguous import make_cache
from engine.model.cache.segmented import Rows, make_kv_segments
from engine.model.paths import leaf_paths, map_paths
from engine.model.transformer import forward
from engine.model.weights.int8 import Int8
from engine.model.weights.matmul import dense
from engine.storage.digest import digest

ROWS, CAPACITY, CHUNK = 5, 32, 7


def served(tied: bool, kind: str = "int8", dtype: str = "bfloat16"):
    cfg = tiny_config(tied=tied, dtype=dtype)
    return cfg, quantize(for_inference(cfg, lively_params(cfg)), every_product(lively_params(cfg), kind))


@pytest.mark.parametrize("tied", [False, True])
def test_all_that_is_multiplied_by_is_int8_and_nothing_else(tied):
    cfg = tiny_config(tied=tied)
    params, seen = lively_params(cfg), []
    before = digest(params)
    small = quantize(params, report=lambda done, total: seen.append((done, total)))
    kinds = {path for path, leaf in leaf_paths(small).items() if isinstance(leaf, Int8)}
    head = "embed" if tied else "head"
    assert kinds == {f"blocks/{layer}/{name}" for layer in (0, 1) for name in ("qkv", "out", "gate_up", "down")} | {head}
    assert seen == [(n, 9) for n in range(1, 10)]
    assert digest(params) == before
    again = for_inference(cfg, small)
    assert all(leaf.values.dtype == jnp.int8 for leaf in leaf_paths(again).values() if isinstance(leaf, Int8))
    with pytest.raises(UserError, match="matches no parameter"):
        quantize(params, [("haed", "int8")])


def test_the_error_of_each_leaf_is_reported():
    params = lively_params(tiny_config())
    errors = round_trips(params, quantize(params))
    assert len(errors) == 9
    assert all(0.001 < error.relative < 0.01 and 0.4 < error.worst <= 0.5001 for error in errors.values())
    wrong = {**params, "head": params["head"] * 1.1}
    assert round_trips(wrong, quantize(params))["head"].worst > 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "full"])
def test_logits_stay_near(tied, kind):
    cfg, small = served(tied, kind, "float32")
    tokens, positions = tokens_of(0, 3, 11), positions_of(3, 11)
    run = jax.jit(lambda params: forward(cfg, params, tokens, positions)[0])
    plain, rounded = run(lively_params(cfg)), run(small)
    error = np.sqrt(((plain - rounded) ** 2).mean() / (plain**2).mean())
    assert 0 < error < 0.05
    written_out = run(map_paths(lambda _, leaf: dense(leaf), small))
    if kind == "full":
        np.testing.assert_allclose(rounded, written_out, atol=1e-4 * np.abs(written_out).max())


def made_of_a_weights_size(params, program) -> list[str]:
    """Finds what a compiled program makes that has as many numbers as an Int8 leaf: none should be converted or copied."""
    sizes = {leaf.values.size for leaf in leaf_paths(params).values() if isinstance(leaf, Int8)}
    made = re.findall(r"= (\w+\[([\d,]+)\]\S* (?:convert|copy|transpose|fusion)\()", program.compile().as_text())
    return [what for what, shape in made if np.prod([int(n) for n in shape.split(",")]) in sizes]


@functools.cache
def wider(tied: bool, kind: str):
    """A model none of whose weights has as many numbers as anything else in a program for 3 rows, 5 or 33."""
    cfg = tiny_config(width=64, heads=4, kv_heads=2, head_dim=16, ff=160, vocab=300, dtype="bfloat16", tied=tied)
    params = lively_params(cfg)
    return cfg, for_inference(cfg, quantize(params, every_product(params, kind)))


@pytest.mark.parametrize("kind", ["int8", "full"])
def test_a_decode_step_makes_nothing_of_a_weights_size(kind):
    """Integers are read as they lie. A weight that is converted is seen: the check can fail."""
    cfg, params = wider(False, kind)
    token, cache = jnp.zeros(ROWS, jnp.int32), make_cache(cfg, ROWS, CAPACITY)
    assert bool(made_of_a_weights_size(params, decode_step.lower(cfg, params, token, cache))) == (kind == "full")


@pytest.mark.parametrize("slots", [3, 33])
@pytest.mark.parametrize("tied", [False, True])
def test_neither_does_decoding_for_slots_few_or_many(slots, tied):
    cfg, params = wider(tied, "int8")
    token = jnp.zeros(slots, jnp.int32)
    state = make_kv_segments(cfg, slots, CAPACITY, 16), make_token_counts(cfg, slots)
    sampling = sampling_of(slots), PenaltyArrays(token > 0, *[jnp.zeros(slots)] * 3)
    arguments = *state, token, Rows(token, token, token), *sampling, jnp.int32(2), jnp.bool_(True)
    assert made_of_a_weights_size(params, decode_slots.lower(cfg, params, *arguments)) == []

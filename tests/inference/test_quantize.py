"""Int8 weights in inference: which leaves, how far off, and the logits stay near."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.inference.decode import prepare_params
from engine.inference.runner import decode_slots
from engine.inference.sampling import make_token_counts, make_token_masks
from engine.model.cache.segmented import CacheRows, make_kv_segments, segment_edges
from engine.model.config import MATRICES
from engine.model.paths import leaf_paths, map_paths
from engine.model.transformer import forward
from engine.model.weights.int8 import Int8, quantize
from engine.model.weights.lora import to_dense
from engine.storage.digest import digest
from tests.tiny import assert_near, lively_params, positions_of, sampling_of, tiny_config, tokens_of

CAPACITY = 32


@pytest.mark.parametrize("tied", [False, True])
def test_all_that_is_multiplied_by_is_int8_and_nothing_else(tied):
    cfg = tiny_config(tied=tied)
    params = lively_params(cfg)
    before = digest(params)
    prepared = prepare_params(cfg, quantize(params))
    for layout, names in ((quantize(params), MATRICES), (prepared, ("qkv", "out", "gate_up", "down"))):
        kinds = {
            path: leaf.values.dtype for path, leaf in leaf_paths(layout).items() if isinstance(leaf, Int8)
        }
        matrices = [f"blocks/{layer}/{name}" for layer in (0, 1) for name in names]
        assert kinds == dict.fromkeys([*matrices, "embed" if tied else "head"], jnp.int8)
    assert digest(params) == before


@pytest.mark.law("quantisation")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "full"])
def test_logits_stay_near(tied, kind):
    cfg = tiny_config(tied=tied)
    params = lively_params(cfg)
    small = quantize(prepare_params(cfg, params), kind)
    tokens, positions = tokens_of(0, 3, 11), positions_of(3, 11)
    run = jax.jit(lambda params: forward(cfg, params, tokens, positions)[0])
    plain, rounded = run(params), run(small)
    error = np.sqrt(((plain - rounded) ** 2).mean() / (plain**2).mean())
    assert 0 < error < 0.05
    if kind == "full":
        written_out = run(map_paths(lambda _, leaf: to_dense(leaf), small))
        assert_near(rounded, written_out, 1e-4)


def made_of_a_weights_size(params, program) -> list[str]:
    """Finds what a compiled program makes that has as many numbers as an Int8 leaf: none should be
    converted or copied.
    """
    sizes = {leaf.values.size for leaf in leaf_paths(params).values() if isinstance(leaf, Int8)}
    matches = re.findall(
        r"= (\w+\[([\d,]+)\]\S* (?:convert|copy|transpose|fusion)\()", program.compile().as_text()
    )
    return [result for result, shape in matches if np.prod([int(n) for n in shape.split(",")]) in sizes]


@functools.cache
def wider(tied: bool, kind: str):
    """A model none of whose weights has as many numbers as anything else in a program for 3 rows or
    33.
    """
    cfg = tiny_config(
        width=64, heads=4, kv_heads=2, head_dim=16, ff=160, vocab=300, dtype="bfloat16", tied=tied
    )
    params = lively_params(cfg)
    return cfg, prepare_params(cfg, quantize(params, kind))


WHOLE = ((33, True, "int8"), (3, False, "full"))


@pytest.mark.parametrize(
    ("slots", "tied", "kind"),
    [(3, False, "int8"), *(pytest.param(*each, marks=pytest.mark.whole) for each in WHOLE)],
)
def test_decoding_makes_nothing_of_a_weights_size(slots, tied, kind):
    """For slots few or many, integers are read as they lie. A weight that is converted is seen: the
    check can fail.
    """
    cfg, params = wider(tied, kind)
    token = jnp.zeros(slots, jnp.int32)
    state = make_kv_segments(cfg, slots, segment_edges(CAPACITY, 16, 16)), make_token_counts(cfg, slots)
    sampling = sampling_of(slots), make_token_masks(slots, cfg.vocab)
    arguments = *state, token, CacheRows(token, token, token, token), *sampling, jnp.int32(2), jnp.bool_(True)
    assert bool(made_of_a_weights_size(params, decode_slots.lower(cfg, params, *arguments))) == (
        kind == "full"
    )

"""Forward alone saves nothing; training's residuals grow with every block. Both by what NumPy allocates."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.by_hand import model
from tests.by_hand.wide import weights
from tests.tiny import FAMILY, tiny_config, tokens_of

B, T, V = 3, 64, 41
NOISE = 40_000  # bytes of Python's own objects
OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"qk_norm": False, "qkv_bias": True, "tied": True}], ids=str
)


def arrays_in(part: Any) -> list[np.ndarray]:
    if part is None or isinstance(part, np.ndarray):
        return [] if part is None else [part]
    return [array for inner in part for array in arrays_in(inner)]


def array_bytes(residuals: Any) -> int:
    """Returns the bytes of the residuals' arrays, or of a part of them; shared memory counts once."""
    owners = [array if array.base is None else array.base for array in arrays_in(residuals)]
    return sum({id(owner): owner.nbytes for owner in owners}.values())


def traced_bytes(cfg: Any, function: Callable) -> tuple[Any, int, int]:
    """Returns a function's result of (cfg, params, tokens), the bytes it leaves, and its peak."""
    params, tokens = weights(cfg), tokens_of(0, B, T)
    function(cfg, params, tokens)  # whatever is made once is made
    gc.collect()
    tracemalloc.start()
    result = function(cfg, params, tokens)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, held, most


def assert_saves_nothing(function: Callable, options: dict) -> None:
    """All that is left is the logits, and eight blocks take no more than two."""
    peaks = []
    for layers in (2, 8):
        logits, held, most = traced_bytes(tiny_config(layers=layers, **options), function)
        assert held <= logits.nbytes + NOISE
        peaks.append(most)
    assert peaks[1] <= peaks[0] + NOISE


@pytest.mark.law("forward only")
@OPTIONS
def test_forward_alone_saves_nothing(options):
    assert_saves_nothing(model.forward, options)


@pytest.mark.law("forward only")
@OPTIONS
def test_forward_alone_allocates_for_no_backward(options):
    """The peak holds one block's scores, once, and their operands: less than a block's residuals."""
    cfg = tiny_config(layers=8, **options)
    _, _, most = traced_bytes(cfg, model.forward)
    _, residuals = model.forward_with_residuals(cfg, weights(cfg), tokens_of(0, B, T))
    scores = 8 * B * cfg.heads * T * T
    stream, heads = 8 * B * T * cfg.width, 8 * B * T * cfg.qkv_width
    assert scores < most < scores + stream + heads + scores // 8 + NOISE
    assert most < array_bytes(residuals.blocks[0]) <= array_bytes(residuals) / 8


def test_the_check_sees_a_forward_with_residuals():
    with pytest.raises(AssertionError):
        assert_saves_nothing(lambda *args: model.forward_with_residuals(*args)[0], {})


@OPTIONS
def test_residuals_grow_with_every_block(options):
    held = {}
    for layers in (2, 5):
        (logits, residuals), held[layers], _ = traced_bytes(
            tiny_config(layers=layers, **options), model.forward_with_residuals
        )
        assert abs(held[layers] - logits.nbytes - array_bytes(residuals)) < NOISE
    block = array_bytes(residuals.blocks[1])
    assert block > 8 * B * T * 6 * T, "the attention weights alone"
    assert abs(held[5] - held[2] - 3 * block) < NOISE


@pytest.mark.parametrize("name", FAMILY)
def test_residuals_are_what_the_formula_says(name):
    cfg = FAMILY[name]
    _, residuals = model.forward_with_residuals(cfg, weights(cfg), tokens_of(0, B, T))
    assert array_bytes((residuals.blocks, residuals.x, residuals.h)) == 8 * model.residual_count(cfg, B, T)

"""Greedy generation by hand gives the engine's tokens, and changes no weight."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.by_hand import model as module
from engine.by_hand.model import generate, to_numpy, tree_map
from engine.errors import UserError
from engine.inference.engine import complete
from engine.inference.request import SamplingParams
from tests.by_hand.wide import QWEN3, weights
from tests.tiny import FAMILY, lively_params

PROMPTS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@pytest.mark.parametrize("name", ["qwen3", pytest.param("qwen2", marks=pytest.mark.whole)])
@settings(max_examples=3)
@given(prompt=PROMPTS, seed=st.integers(0, 9))
def test_greedy_tokens_are_the_engines(name, prompt, seed):
    cfg = FAMILY[name]
    params = lively_params(cfg, seed)
    (expected,) = complete(cfg, params, [prompt], [SamplingParams(max_tokens=13, temperature=0.0)])
    weights = to_numpy(params)
    before = tree_map(np.copy, weights)
    assert list(generate(cfg, weights, prompt, max_tokens=13)) == expected.tokens
    tree_map(np.testing.assert_array_equal, weights, before)


def test_end_and_context_stop_it():
    tokens = list(generate(QWEN3, weights(QWEN3), [3, 1], max_tokens=8))
    end = tokens[4]
    assert (
        list(generate(QWEN3, weights(QWEN3), [3, 1], max_tokens=8, eos_id=end)) == tokens[: tokens.index(end)]
    )
    assert len(list(generate(QWEN3, weights(QWEN3), [1] * 147, max_tokens=8))) == QWEN3.context - 147


@pytest.mark.law("forward only")
def test_forward_alone_is_all_it_uses(monkeypatch):
    monkeypatch.delattr(module, "forward_with_residuals")
    monkeypatch.delattr(module, "backward")
    assert len(list(generate(QWEN3, weights(QWEN3), [3, 1], max_tokens=2))) == 2
    for prompt in ([], [1] * QWEN3.context):
        with pytest.raises(UserError, match="1 to 149 fit a context of 150"):
            next(generate(QWEN3, weights(QWEN3), prompt, max_tokens=1))

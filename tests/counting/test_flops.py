"""Laws of the FLOP formulas: published sizes, identities; `test_program_flops.py` holds them to programs."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.counting.flops import forward_flops, prefill_flops, train_flops
from engine.counting.params import count_params
from engine.errors import UserError
from engine.model.config import MATRICES, LoraConfig, ModelConfig
from engine.model.trainable import TrainablePaths, all_trainable, lora_only, lowest_gradient
from tests.tiny import trainable_paths

SMALL = ModelConfig(vocab=19, width=12, layers=3, heads=6, kv_heads=3, head_dim=4, ff=10, context=64)


@st.composite
def configs(draw):
    kv_heads = draw(st.integers(1, 4))
    return ModelConfig(
        vocab=draw(st.integers(2, 300)),
        width=draw(st.integers(1, 64)),
        layers=draw(st.integers(1, 6)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 16)),
        ff=draw(st.integers(1, 128)),
        context=64,
        tied=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
    )


# ---- identities


@pytest.mark.law("factor of three")
@settings(max_examples=40)
@given(configs(), st.integers(1, 50), st.sampled_from(["causal", "full"]))
def test_forward_is_a_third_of_training(cfg, tokens, attention):
    work = train_flops(cfg, tokens, attention=attention)
    assert 3 * work.by_pass.forward == work.total
    assert work.by_pass.forward == forward_flops(cfg, tokens, attention=attention).total
    for name in (*MATRICES, "head"):
        assert work.parts[name].forward == work.parts[name].dx == work.parts[name].dw


@settings(max_examples=40)
@given(configs(), st.integers(1, 50))
def test_causal_attention_is_half_of_full_and_blocks_lie_between(cfg, tokens):
    full, causal, blocks = (train_flops(cfg, tokens, attention=kind) for kind in ("full", "causal", 1))
    assert 2 * causal.parts["attention"].forward == full.parts["attention"].forward
    assert full.total - causal.total == full.parts["attention"].forward * 3 // 2
    assert full.parts["attention"].forward == 4 * cfg.layers * tokens * cfg.heads * cfg.head_dim
    assert causal.total < blocks.total <= full.total
    assert train_flops(cfg, tokens, attention=tokens) == full
    assert train_flops(cfg, tokens, attention=tokens + 1) == full  # a block that does not divide T


@settings(max_examples=40)
@given(configs(), st.integers(1, 50))
def test_a_token_by_the_mfu_convention_is_6n_and_12ldt(cfg, seq):
    attention_width = cfg.heads * cfg.head_dim
    expected = 6 * count_params(cfg).matmul + 12 * cfg.layers * attention_width * seq
    assert train_flops(cfg, seq, attention="full").total == expected


@settings(max_examples=40)
@given(configs(), st.integers(1, 40), st.integers(0, 40))
def test_reading_a_prompt_is_decoding_its_tokens_with_one_head(cfg, tokens, cached):
    """Full attention over a cache of S places is T decodes at length S; only the last needs logits."""
    prefilled = prefill_flops(cfg, tokens, attention="full", cached=cached)
    decoded = forward_flops(cfg, cached + tokens, attention="full")
    head = decoded.parts["head"].forward
    assert prefilled.total == tokens * (decoded.total - head) + head
    assert prefilled.total == prefilled.by_pass.forward
    one_block = prefill_flops(cfg, tokens, attention="causal")
    full = prefill_flops(cfg, tokens, attention="full")
    assert 2 * one_block.parts["attention"].forward == full.parts["attention"].forward


def test_the_lowest_block_that_the_backward_pass_enters():
    ways = (
        all_trainable(SMALL),
        trainable_paths(SMALL, freeze="bottom:2"),
        trainable_paths(SMALL, freeze="top:2"),
        trainable_paths(SMALL, train="head"),
    )
    assert [lowest_gradient(SMALL, paths) for paths in ways] == [0, 2, 0, SMALL.layers]
    assert lowest_gradient(SMALL, lora_only(SMALL, LoraConfig(2, targets=("down",)))) == 0
    tied = dataclasses.replace(SMALL, tied=True)
    assert lowest_gradient(tied, trainable_paths(tied, train="head")) == 0


# ---- bad input


def test_what_cannot_be_trained_is_refused_by_name():
    with pytest.raises(UserError, match="the model has 3"):
        trainable_paths(SMALL, freeze="bottom:4")
    with pytest.raises(UserError, match="no parameter 'blocks/0/norm'"):
        train_flops(
            SMALL, 7, attention="full", trainable=TrainablePaths(frozenset(), frozenset({"blocks/0/norm"}), 2)
        )
    with pytest.raises(UserError, match="Did you mean 'blocks/0/gate'"):
        train_flops(SMALL, 7, attention="full", trainable=TrainablePaths(frozenset({"blocks/0/gaet"})))

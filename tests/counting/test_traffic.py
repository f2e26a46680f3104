"""Laws of the bytes moved: what is exact, what slots share, what freezing and remat change."""

import dataclasses

import pytest
from plain_model import cache_of

from engine.counting.memory import training_memory
from engine.counting.params import count_params
from engine.counting.traffic import inference_bytes, train_bytes
from engine.counting.trainable_paths import bottom_frozen, head_only, lora_only
from engine.model.config import LoraConfig, ModelConfig

CFG = ModelConfig(vocab=19, width=12, layers=3, heads=6, kv_heads=3, head_dim=4, ff=10, context=64)
COUNT = count_params(CFG)
TABLE, DOWN, NORMS = 19 * 12, 3 * 10 * 12, 7 * 12
ADAPTER = lora_only(CFG, LoraConfig(5, targets=("q", "v")))


def test_adamw_moves_28_bytes_a_parameter_that_learns():
    assert train_bytes(CFG, 2, 7).optimizer == 28 * COUNT.total
    assert train_bytes(CFG, 2, 7, trainable=head_only(CFG)).optimizer == 28 * TABLE
    assert train_bytes(CFG, 2, 7, trainable=ADAPTER).optimizer == 28 * 3 * 5 * (12 + 24 + 12 + 12)


def test_weights_are_read_forward_and_for_dx_and_again_with_remat():
    cfg = dataclasses.replace(CFG, dtype="float32")
    assert train_bytes(cfg, 2, 7).weights == 2 * 4 * COUNT.matmul  # all above the table has a dX
    assert train_bytes(CFG, 2, 7).weights == 2 * 2 * COUNT.matmul + (4 + 2) * COUNT.matmul
    full, block = (dataclasses.replace(cfg, remat=remat) for remat in ("full", "block"))
    assert train_bytes(full, 2, 7).weights == 3 * 4 * COUNT.matmul
    assert train_bytes(block, 2, 7).weights == 3 * 4 * COUNT.matmul - 4 * (TABLE + DOWN)
    assert train_bytes(cfg, 2, 7, trainable=head_only(cfg)).weights == 4 * COUNT.matmul


@pytest.mark.parametrize(("remat", "blocks"), [("none", (9, 7, 6)), ("block", (15, 9, 6)), ("full", (15, 13, 6))])
def test_a_block_is_written_and_read_going_up_and_where_it_is_made_again_and_read_going_down(remat, blocks):
    """All of it; with two blocks of three frozen; with all frozen below the head, where nothing is made again."""
    cfg = dataclasses.replace(CFG, remat=remat)
    steps = [train_bytes(cfg, 2, 7, trainable=paths) for paths in (None, bottom_frozen(CFG, 2), head_only(CFG))]
    assert [step.activations for step in steps] == [count * training_memory(CFG, 2, 7).block for count in blocks]
    assert steps[0].total > steps[1].total > steps[2].total


@pytest.mark.parametrize("slots", [1, 2, 32])
def test_slots_share_the_weights_and_nothing_else(slots):
    cfg = dataclasses.replace(CFG, tied=True)
    alone, many = inference_bytes(cfg, 1, 11), inference_bytes(cfg, slots, 11)
    assert many.weights == alone.weights
    assert (many.cache, many.activations, many.logits) == tuple(
        slots * part for part in (alone.cache, alone.activations, alone.logits)
    )


def test_decoding_reads_the_cache_and_writes_one_token_to_it():
    cache = cache_of(CFG, 5, 11)
    size = sum(array.size * array.dtype.itemsize for array in (*cache.k, *cache.v))
    assert inference_bytes(CFG, 5, 11).cache == size * 12 // 11
    assert inference_bytes(CFG, 5, 11, tokens=7).cache == size * 18 // 11
    assert inference_bytes(CFG, 5, 0, tokens=7, every_logit=True).cache == 0

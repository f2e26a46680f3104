"""The formulas for this engine's programs equal the products in their jaxprs, on a CPU and elsewhere."""

import dataclasses
import functools

import jax
import pytest

from engine.counting.flops import add_layers, flops_by_layer, forward_flops
from engine.counting.jaxpr import jaxpr_cost
from engine.counting.program_flops import decode_program_flops, prefill_program_flops
from engine.inference import decode
from engine.model import loss
from engine.model.attention_in_blocks import QUERY_BLOCK
from engine.model.config import LoraConfig
from engine.model.loss import score
from engine.model.paths import split, unflatten
from engine.model.shapes import leaf_shapes
from engine.model.trainable import TrainablePaths, all_trainable, lora_only
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import make_adapter
from engine.training.step import loss_and_gradient
from tests.counting.shapes_only import batch_of, cache_of, modes, params_of, shaped
from tests.tiny import B, T, tiny_config

LAYERS, CAPACITY = 3, 23
KINDS = {
    "untied": tiny_config(layers=LAYERS),
    "tied": tiny_config(layers=LAYERS, tied=True, qk_norm=False),
    "biased": tiny_config(layers=LAYERS, qkv_bias=True, tied=True, kv_heads=6),
}


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.night)])
def backend(request, monkeypatch):
    """Both programs are traced, on whatever machine this is; a GPU's by day where its attention
    makes the difference.
    """
    monkeypatch.setattr("engine.model.ops.platform", lambda: request.param)


BOTH = pytest.mark.parametrize("backend", ["cpu", "gpu"], indirect=True)


def trees(cfg, paths):
    """(trainable, frozen) as shapes, the way a run makes them."""
    params = params_of(cfg)
    if not paths.adapted:
        return split(params, paths.weights)
    adapter = lambda path: jax.eval_shape(
        lambda: make_adapter(jax.random.key(0), leaf_shapes(cfg)[path], rank=paths.rank, alpha=1.0)
    )
    return unflatten({path: adapter(path) for path in paths.adapted}), params


def each_leaf(cfg):
    """Each leaf alone, of the block in the middle and of what is outside the blocks."""
    paths = (path for path in leaf_shapes(cfg) if not path.startswith(("blocks/0", "blocks/2")))
    return {path: TrainablePaths(frozenset({path})) for path in paths}


def gradient_flops(cfg, rows, tokens, **options):
    return add_layers(flops_by_layer(cfg, tokens, rows=rows * tokens, attention=QUERY_BLOCK, **options)).total


def assert_agreement(cfg, rows, tokens, ways, microbatches=1, **options):
    """The formula is the walker in these ways of training."""
    for name, paths in (
        ways if isinstance(ways, dict) else {name: modes(cfg)[name] for name in ways}
    ).items():
        gradient = functools.partial(loss_and_gradient, cfg, microbatches=microbatches)
        counted = jaxpr_cost(gradient, *trees(cfg, paths), batch_of(rows, tokens)).matmul
        formula = gradient_flops(cfg, rows // microbatches, tokens, trainable=paths, **options) * microbatches
        assert counted == formula, name


# ---- training


FEW, MANY = 2, 10  # sequences of 7: fewer rows than any matrix has columns, and more than most have


@pytest.mark.law("factor of three")
@pytest.mark.parametrize(
    ("rows", "backend"),
    [
        (FEW, "gpu"),
        pytest.param(MANY, "cpu", marks=pytest.mark.whole),
        *(pytest.param(*pair, marks=pytest.mark.night) for pair in ((FEW, "cpu"), (MANY, "gpu"))),
    ],
    indirect=["backend"],
)
def test_the_formula_is_the_walker_in_every_way_of_training(rows, backend):
    assert_agreement(KINDS["untied"], rows, T, modes(KINDS["untied"]))


def test_the_formula_is_the_walker_for_each_leaf_alone(backend):
    assert_agreement(KINDS["untied"], MANY, T, each_leaf(KINDS["untied"]))


@pytest.mark.parametrize("kind", ["tied", "biased"])
def test_the_formula_is_the_walker_for_every_kind_of_model(kind, backend):
    assert_agreement(KINDS[kind], MANY, T, ["everything", "bottom frozen", "head only", "lora"])


@BOTH
@pytest.mark.parametrize("layout", [{"remat": "block"}, {"scan": True}, {"scan": True, "remat": "block"}])
def test_however_the_program_is_laid_out(layout, backend):
    cfg = dataclasses.replace(KINDS["untied"], **layout)
    assert_agreement(cfg, MANY, T, ["everything", "last layer", "lora on v and down", "lora on down"])


def test_in_microbatches(backend):
    assert_agreement(KINDS["biased"], 8, T, ["everything", "lora on gate"], microbatches=4)


@BOTH
def test_in_blocks_of_queries(backend):
    assert_agreement(KINDS["tied"], 1, 2 * QUERY_BLOCK, ["everything", "bottom frozen"])


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_with_the_loss_in_chunks(kind, remat, backend, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_LIMIT", 0)
    monkeypatch.setattr(loss, "CHUNK", 16)
    cfg = dataclasses.replace(KINDS[kind], remat=remat)
    assert_agreement(cfg, B, T, ["everything", "head only"], loss_chunk=16)
    assert_agreement(cfg, B, T, ["last block alone", "norms"])  # a frozen head goes by rows


# ---- forward only


@BOTH
@pytest.mark.parametrize("tokens", [T, 2 * QUERY_BLOCK])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(kind, tokens, backend):
    cfg = KINDS[kind]
    counted = jaxpr_cost(
        functools.partial(score.__wrapped__, cfg), trees(cfg, all_trainable(cfg))[0], batch_of(B, tokens)
    )
    assert counted.matmul == (forward_flops(cfg, tokens, attention=QUERY_BLOCK) * (B * tokens)).total


@BOTH
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_writing_against_a_cache(kind, slots, backend):
    cfg = KINDS[kind]
    params, cache = trees(cfg, all_trainable(cfg))[0], cache_of(cfg, slots, CAPACITY)
    prefill = functools.partial(decode.prefill.__wrapped__, cfg)
    counted = jaxpr_cost(prefill, params, shaped(slots, T), shaped(slots), cache)
    assert counted.matmul == prefill_program_flops(cfg, slots, T, CAPACITY).total
    counted = jaxpr_cost(prefill, params, shaped(slots, 1), shaped(slots), cache)
    assert counted.matmul == decode_program_flops(cfg, slots, CAPACITY).total


def test_whatever_the_weights_are_stored_in(backend):
    """Int8 weights are multiplied as often as others, but for two digits; under LoRA they are a
    frozen base.
    """
    cfg = KINDS["untied"]
    stored = lambda how: jax.eval_shape(
        lambda params: quantize(params, how), trees(cfg, all_trainable(cfg))[0]
    )
    write = functools.partial(decode.prefill.__wrapped__, cfg)
    counted = jaxpr_cost(write, stored("int8"), shaped(5, 1), shaped(5), cache_of(cfg, 5, CAPACITY))
    assert counted.matmul == decode_program_flops(cfg, 5, CAPACITY, int16_activations=["down"]).total
    paths = lora_only(cfg, LoraConfig(2, targets=("q", "up")))
    adapters, _ = trees(cfg, paths)
    for rows in (FEW, MANY):
        counted = jaxpr_cost(
            functools.partial(loss_and_gradient, cfg), adapters, stored("full"), batch_of(rows, T)
        )
        assert counted.matmul == gradient_flops(cfg, rows, T, trainable=paths)

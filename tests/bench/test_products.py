"""The products that are timed alone are those of a decoding step: all matrices, the head among them, and no attention."""

import jax
import jax.numpy as jnp
import pytest
from tiny import lively_params, tiny_config

from bench.table.inference_rows import two_digits
from bench.table.products import products
from engine.counting.programs import decode_program
from engine.counting.walk import count
from engine.counting.xla import xla_cost
from engine.inference.decode import STEPS
from engine.model.weights.int8 import quantize


@pytest.mark.parametrize("changes", [{}, {"tied": True, "qk_norm": False}])
def test_they_are_the_step_without_attention(changes):
    cfg = tiny_config(**changes)
    params, x = lively_params(cfg), jnp.ones((3, 1, cfg.width))
    for weights in (params, quantize(params)):
        parts = decode_program(cfg, 3, 16, two_digits=two_digits(weights)).parts
        expected = STEPS * sum(part.forward for name, part in parts.items() if name != "attention")
        assert count(lambda params, x: products(cfg, params, x), weights, x).matmul == expected
        # And the compiler leaves none of them out, though nobody reads the logits. It counts the loop's body once.
        doc = xla_cost(products.lower(cfg, weights, x).compile()).flops
        assert expected / STEPS <= doc < 1.5 * expected / STEPS
    assert jnp.isfinite(jax.block_until_ready(products(cfg, params, x))).all()

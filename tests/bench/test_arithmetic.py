"""Whether XLA adds up is measured, and said so that a reader knows what to do."""

import jax
import numpy as np
import pytest

from bench.stages import checks as arithmetic


@pytest.mark.parametrize(
    ("result", "adds_up", "words"),
    [
        (lambda right: right, True, "agrees with NumPy to 0e+00"), (lambda right: right * (1 + 1e-6), True, "to 1e-06"),
        (lambda right: right + 1e30, False, "times its largest number. In JAX code of your own"),
        (lambda right: right * np.nan, False, "is not a number. In JAX code of your own"),
    ],
)  # fmt: skip
def test_a_wrong_sum_is_said(monkeypatch, result, adds_up, words):
    right = lambda x: (np.asarray(x, float) @ np.full(arithmetic.SHAPE, 2.5)).sum(-1)
    monkeypatch.setattr(jax, "jit", lambda function: lambda x: result(right(x)))
    check = arithmetic.check_arithmetic()
    assert check["adds_up"] is adds_up
    assert words in check["sentence"]
    assert ("optimization_barrier" in check["sentence"]) is not adds_up


def test_it_looks_at_this_process():
    """Compiled in one loop the sum may be garbage, which differs from run to run; op by op it is right."""
    assert isinstance(arithmetic.check_arithmetic()["adds_up"], bool)
    with jax.disable_jit():
        assert arithmetic.constant_product_error() < 1e-6

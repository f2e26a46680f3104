"""The optimizer: schedules of the shape they name, AdamW and Muon as their authors have them, each rule where it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.counting.jaxpr import jaxpr_cost
from engine.errors import UserError
from engine.model.config import MATRICES
from engine.model.paths import leaf_paths
from engine.training import optimizer
from engine.training.optimizer import (
    POLYNOMIALS,
    SECOND_BEGINS,
    OptimizerConfig,
    make_optimizer,
    make_schedule,
    muon_flops,
    orthogonal,
)


def factors(cfg: OptimizerConfig, *progress: float) -> list[float]:
    return [float(make_schedule(cfg)(jnp.float32(p))) for p in progress]


def test_cosine_warms_up_and_comes_down_half_a_wave():
    cfg = OptimizerConfig(schedule="cosine", warmup=0.2, final=0.1)
    expected = [0.0, 0.5, 1.0, 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 4)), 0.55, 0.1]
    np.testing.assert_allclose(factors(cfg, 0, 0.1, 0.2, 0.4, 0.6, 1.0), expected, atol=1e-6)


def test_wsd_warms_up_stays_and_comes_down_in_a_line():
    cfg = OptimizerConfig(schedule="wsd", warmup=0.1, decay=0.4, final=0.2)
    np.testing.assert_allclose(
        factors(cfg, 0, 0.05, 0.1, 0.3, 0.6, 0.8, 1.0), [0, 0.5, 1, 1, 1, 0.6, 0.2], atol=1e-6
    )


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_without_a_warm_up_the_first_step_is_a_whole_one(kind):
    assert factors(OptimizerConfig(schedule=kind, warmup=0.0), 0.0) == [1.0]


@given(
    st.sampled_from(["cosine", "wsd"]),
    st.floats(0.01, 0.99),
    st.floats(0, 1),
    st.floats(0, 1),
    st.lists(st.floats(0, 1), min_size=2),
)
def test_a_schedule_rises_once_then_falls_between_nought_and_one(kind, warmup, decay, final, progress):
    cfg = OptimizerConfig(schedule=kind, warmup=warmup, decay=decay * (1 - warmup) * 0.99, final=final)
    progress = sorted(np.float32([*progress, warmup, 1.0]))
    values = np.array(factors(cfg, *progress))
    assert (values >= 0).all()
    assert (values <= 1 + 1e-6).all()
    top = progress.index(np.float32(warmup))
    assert (np.diff(values[: top + 1]) >= -1e-5).all()
    assert (np.diff(values[top:]) <= 1e-5).all()
    assert abs(values[-1] - final) < 1e-4


def gradients_like(params, seed: int, size: float):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape, np.float32)), params)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_without_a_gradient_only_what_is_ruled_decays(kind):
    from tests.tiny import lively_params, tiny_config

    params = lively_params(tiny_config(qkv_bias=True))
    rates = {"learning_rate": 0.1, "matrix_learning_rate": 0.2, "embedding_factor": 3.0, "head_factor": 5.0}
    tx = make_optimizer(OptimizerConfig(kind=kind, **rates, weight_decay=0.5, warmup=0.0, schedule="wsd"))
    nothing = jax.tree.map(jnp.zeros_like, params)
    step = lambda params: tx.update(
        nothing, tx.init(params), params, progress=jnp.float32(0.01), dtype="float32"
    )[0]
    for path, update in leaf_paths(jax.jit(step)(params)).items():
        leaf = leaf_paths(params)[path]
        rate = (
            0.2
            if kind == "muon" and path.split("/")[-1] in MATRICES
            else 0.1 * {"embed": 3, "head": 5}.get(path, 1)
        )
        undecayed = path.endswith(("norm", "bias"))
        np.testing.assert_allclose(
            update, 0 * leaf if undecayed else -rate * 0.5 * leaf, rtol=1e-5, err_msg=path
        )


def test_muon_moves_the_matrices_inside_blocks_and_adamw_the_rest(params):
    progress = jnp.float32(0.5)
    updates = {}
    for kind in ("adamw", "muon"):
        tx = make_optimizer(OptimizerConfig(kind=kind))
        update = jax.jit(
            lambda g, params, tx=tx: tx.update(
                g, tx.init(params), params, progress=progress, dtype="float32"
            )[0]
        )
        updates[kind] = update(gradients_like(params, 0, 1.0), params)
    for path, leaf in leaf_paths(updates["adamw"]).items():
        same = np.array_equal(leaf, leaf_paths(updates["muon"])[path])
        assert same == (path.split("/")[-1] not in MATRICES), path


@jax.jit
def optaxs_muon(matrix):
    tx = optax.contrib.muon(-1.0)
    return tx.update({"w": matrix}, tx.init({"w": matrix}), {"w": matrix})[0]["w"]


@pytest.mark.parametrize("shape", [(20, 48), (48, 20), (24, 20), (20, 20)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_singular_values_go_through_the_polynomials(shape, size):
    """In float64 by a singular value decomposition: those of a wide matrix begin at the second
    step. Whatever their size.
    """
    matrix = np.float32(size) * np.random.default_rng(0).standard_normal(shape, np.float32)
    u, values, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    values /= (1.01 * np.sqrt(np.sum(values**8))) ** 0.25
    steps = POLYNOMIALS
    if max(shape) > 2 * min(shape):
        values, steps = values * SECOND_BEGINS, POLYNOMIALS[1:]
    for a, b, c in steps:
        values = a * values + b * values**3 + c * values**5
    expected = (u * values) @ v * max(1, shape[1] / shape[0]) ** 0.5
    np.testing.assert_allclose(
        orthogonal(jnp.asarray(matrix), jnp.dtype("float32")), expected, rtol=0, atol=2e-4
    )
    actual = orthogonal(jnp.asarray(matrix), jnp.dtype("bfloat16"))
    assert actual.dtype == jnp.float32
    assert np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)


def test_each_polynomial_begins_where_those_before_it_end():
    """Also above the largest that they make: there the next would grow, and rounding gets there."""
    values = np.linspace(0.003, 1, 9999)
    for at, (a, b, c) in enumerate(POLYNOMIALS):
        values = a * values + b * values**3 + c * values**5
        if at == 0:
            assert values.max() == pytest.approx(SECOND_BEGINS, abs=1e-3)
    assert 0.73 < values.min() < values.max() < 1.14


def test_muons_momentum_is_optaxs(params, monkeypatch):
    """With their iteration. They correct the momentum's early bias and we leave it: after many
    steps no difference is left.
    """
    cfg = OptimizerConfig(
        kind="muon",
        momentum=0.5,
        weight_decay=0.0,
        clip=float("inf"),
        matrix_learning_rate=1.0,
        schedule="wsd",
        warmup=0.1,
    )
    monkeypatch.setattr(optimizer, "orthogonal", lambda matrix, dtype: optaxs_muon(matrix))
    matrices = {"blocks": {"0": {name: params["blocks"]["0"][name] for name in ("q", "down")}}}
    ours, theirs = make_optimizer(cfg), optax.contrib.muon(1.0, beta=0.5)
    states = ours.init(matrices), theirs.init(matrices)
    step = jax.jit(lambda g, s: ours.update(g, s, matrices, progress=jnp.float32(0.3), dtype="float32"))
    optax_step = jax.jit(lambda g, s: theirs.update(g, s, matrices))
    for seed in range(25):
        gradients = gradients_like(matrices, seed, 1.0)
        (actual, first), (expected, second) = step(gradients, states[0]), optax_step(gradients, states[1])
        states = first, second
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("matrix_learning_rate", 11.0),
        ("warmup", 1.5),
        ("head_factor", -1.0),
        ("decay", -0.1),
        ("final", 2.0),
        ("beta1", -0.5),
        ("beta2", 1.01),
        ("momentum", float("inf")),
        ("weight_decay", -1e-9),
        ("clip", 0.0),
        ("clip", -1.0),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        OptimizerConfig(**{field: value})


def test_a_schedule_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="longer than the run"):
        OptimizerConfig(schedule="wsd", warmup=0.6, decay=0.5)


def test_muon_multiplies_as_much_as_is_predicted(cfg, params):
    tx = make_optimizer(OptimizerConfig(kind="muon"))
    update = lambda params: tx.update(
        params, tx.init(params), params, progress=jnp.float32(0.5), dtype="bfloat16"
    )
    assert jaxpr_cost(update, params).matmul == muon_flops(cfg)

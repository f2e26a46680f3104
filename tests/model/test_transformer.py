"""The transformer: what a token may know, and that no way of running it computes anything else than the one on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.model.transformer import forward, hidden_states, init_params, make_cache
from tests.tiny import FAMILY, B, T, assert_near, lively_params, positions_of, tiny_config, tokens_of

run = jax.jit(forward, static_argnums=0)
init = jax.jit(init_params, static_argnums=0)
hidden_of = jax.jit(lambda cfg, *args: hidden_states(cfg, *args)[0], static_argnums=0)

QWEN3, QWEN2 = FAMILY["qwen3"], FAMILY["qwen2"]


def leave_the_cpu(monkeypatch) -> None:
    """From here on programs are traced as for another platform, without what a CPU does in its own
    way.
    """
    monkeypatch.setattr("engine.model.ops.platform", lambda: "gpu")


@pytest.fixture
def elsewhere(monkeypatch):
    leave_the_cpu(monkeypatch)


@pytest.fixture(params=["cpu", "elsewhere"])
def reads(request):
    """`forward`, compiled for a CPU, and as for another device."""
    if request.param == "cpu":
        return run
    request.getfixturevalue("elsewhere")
    return jax.jit(lambda *arguments: forward(*arguments), static_argnums=0)


def test_bfloat16_is_the_same_model_less_precisely(cfg):
    params = lively_params(cfg, 1)
    tokens = tokens_of(0, B, T)
    exact, _ = run(cfg, params, tokens, positions_of(B, T))
    actual, _ = run(tiny_config(dtype="bfloat16"), params, tokens, positions_of(B, T))
    assert actual.dtype == jnp.float32
    error = np.abs(actual - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05


SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [2, 2, 5, 5, 5, 6, 6]], np.int32)


@pytest.mark.law("causality")
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one text a row", "packed"])
def test_a_token_knows_what_came_before_it_and_nothing_else(cfg, params, segments, reads):
    """d logits[b, t] / d embedding[b', t'] is exactly 0 unless b' = b, t' <= t and both stand in
    one text.
    """
    tokens = (
        np.random.default_rng(0).permutation(cfg.vocab)[: B * T].reshape(B, T).astype(np.int32)
    )  # no two alike
    mixing = np.random.default_rng(1).standard_normal(cfg.vocab).astype(np.float32)

    def outputs(embed):
        logits, _ = reads.__wrapped__(
            cfg, params | {"embed": embed}, tokens, positions_of(B, T), None, segments
        )
        return logits @ mixing

    jacobian = jax.jit(jax.jacrev(outputs))(params["embed"])  # (B, T, V, D)
    felt = np.abs(jacobian).max(-1)[:, :, tokens]  # (B, T, B, T)
    for b, t, b_, t_ in np.ndindex(B, T, B, T):
        may = b == b_ and t_ <= t and (segments is None or segments[b, t] == segments[b, t_])
        assert (felt[b, t, b_, t_] > 0) == may, (b, t, b_, t_)


@pytest.mark.law("causality")
def test_texts_packed_into_a_row_are_read_as_if_alone(cfg, params):
    tokens = tokens_of(0, B, T)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0, 1]], np.int32)
    packed, _ = run(cfg, params, tokens, positions, None, SEGMENTS)
    for b, start, end in ((0, 0, 3), (0, 3, 7), (1, 0, 2), (1, 2, 5), (1, 5, 7)):
        alone = np.zeros((B, T), np.int32)
        alone[0, : end - start] = tokens[b, start:end]
        expected, _ = run(cfg, params, alone, positions_of(B, T))
        np.testing.assert_allclose(packed[b, start:end], expected[0, : end - start], atol=2e-5, rtol=0)


# prefill in two chunks, then token by token
PIECES = [(0, 5), (5, 10), (10, 11), (11, 12), (12, 13)]


def assert_cached_is_uncached(reads, cfg, tolerance: float) -> None:
    params, tokens = lively_params(cfg), tokens_of(0, B, 13)
    expected, _ = reads(cfg, params, tokens, positions_of(B, 13))
    cache, actual = make_cache(cfg, B, 15), []
    for start, end in PIECES:
        logits, cache = reads(cfg, params, tokens[:, start:end], positions_of(B, 13)[:, start:end], cache)
        assert cache.length.tolist() == [start] * B, "how many tokens were real is for the caller to say"
        cache = cache._replace(length=cache.length + (end - start))
        actual.append(logits)
    assert_near(np.concatenate(actual, 1), expected, tolerance)


@pytest.mark.law("cache equivalence")
@pytest.mark.parametrize("cfg", FAMILY.values(), ids=FAMILY)
def test_cached_is_uncached_at_every_position(cfg):
    assert_cached_is_uncached(run, cfg, 1e-5)


def test_cached_is_uncached_in_bfloat16():
    assert_cached_is_uncached(run, tiny_config(dtype="bfloat16"), 0.03)


def test_cached_is_uncached_on_other_devices(elsewhere):
    assert_cached_is_uncached(jax.jit(lambda *arguments: forward(*arguments), static_argnums=0), QWEN3, 1e-5)


@pytest.mark.law("layout equivalence")
def test_no_layout_changes_what_is_computed(cfg, params):
    """Unrolled or scanned, saved or recomputed: one value and one gradient. And each is really
    another program.
    """
    tokens, weights = (
        tokens_of(0, B, T),
        np.random.default_rng(1).standard_normal((B, T, cfg.vocab)).astype(np.float32),
    )

    def slope(**layout):
        def value(params):
            logits, _ = forward(tiny_config(**layout), params, tokens, positions_of(B, T), segments=SEGMENTS)
            return (logits * weights).sum()

        text = str(jax.make_jaxpr(value)(params))
        return jax.jit(jax.value_and_grad(value))(params), (
            " scan[" in text,
            "checkpoint" in text or "remat" in text,
        )

    expected, signs = slope()
    assert signs == (False, False)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1])) > 0.1, "every leaf is felt"
    for layout in ({"scan": True, "remat": "block"}, {"remat": "block"}, {"scan": True}):
        result, signs = slope(**layout)
        assert signs == ("scan" in layout, "remat" in layout)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), result, expected)


def test_a_fresh_model_knows_nothing():
    """Each block starts as the identity and an untied head at zero: the first loss is ln V to the
    bit, tied nearly so.
    """
    tokens = tokens_of(0, B, T)
    params = init(QWEN3, jax.random.key(3))
    logits, _ = run(QWEN3, params, tokens, positions_of(B, T))
    assert not np.asarray(logits).any()
    x = np.asarray(params["embed"])[tokens]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + QWEN3.eps)
    np.testing.assert_allclose(hidden_of(QWEN3, params, tokens, positions_of(B, T)), x, rtol=1e-5)

    logits, _ = run(QWEN2, init(QWEN2, jax.random.key(3)), tokens, positions_of(B, T))
    assert abs(float(jax.nn.logsumexp(logits, -1).mean()) - np.log(QWEN2.vocab)) < 0.1


@pytest.mark.law("determinism")
def test_a_key_gives_one_model_and_another_key_another():
    first, same, other = (init(QWEN3, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.array_equal(first["embed"], other["embed"])
    matrices = [first["blocks"][i][name] for i in "01" for name in ("q", "gate")]
    for matrix in matrices:
        np.testing.assert_allclose(np.std(matrix), matrix.shape[0] ** -0.5, rtol=0.1)
    assert not np.array_equal(matrices[0], matrices[2]), "no two blocks are alike"

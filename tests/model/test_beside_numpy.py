"""Each layer and its gradient, compiled, beside the ones by hand in NumPy's float64, at the sizes of real models.

XLA chooses its kernels by size: one that is wrong at width 320 can be right at width 20, where
other tests look.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.by_hand import layers as by_hand
from engine.by_hand import loss_and_gradient as by_hand_gradient
from engine.model import attention, backward, layers, loss
from engine.model.config import Llama3Scaling, LoraConfig, ModelConfig, YarnScaling
from engine.model.paths import leaf_paths, map_paths
from engine.model.weights.int8 import Int8, quantize
from engine.model.weights.lora import init_lora
from engine.model.weights.matmul import project, project_each
from engine.model.weights.plain import Plain
from engine.text.batch import Batch
from engine.training.step import loss_and_gradient
from tests.tiny import assert_near, lively_params, positions_of, tokens_of

B, T, D, F, V, N, K, H = 5, 62, 320, 864, 700, 6, 3, 64
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
TOLERANCE = {
    F32: 5e-6,
    BF16: 2.5e-2,
}  # of a result's largest number; bfloat16 has 8 bits, and the layers round on the way
EPS = 0.1  # large enough to be felt
BOTH = pytest.mark.parametrize("module", [layers, backward], ids=["layers", "backward"])
ATTENTION = pytest.mark.parametrize("module", [layers, attention], ids=["layers", "attention"])
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def numbers(seed: int, *shape: int, dtype=F32, scale: float = 1.0) -> jax.Array:
    """Random numbers that `dtype` holds: both sides start from the same."""
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def compare(ours, forward, gradients, arguments, dtype) -> None:
    """ours(*arguments) and its gradients beside forward(*arguments) and gradients(dy, *arguments)
    by hand.
    """

    @jax.jit
    def run(arguments, dy):
        out, pull = jax.vjp(ours, *arguments)
        return out, pull(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), dy, out))

    expected = forward(*exact(arguments))
    dy = jax.tree.map(lambda leaf: numbers(99, *leaf.shape, dtype=BF16), expected)
    out, slopes = run(arguments, dy)
    assert [slope.dtype for slope in slopes] == [argument.dtype for argument in arguments]
    assert_near((out, slopes), (expected, gradients(exact(dy), *exact(arguments))), TOLERANCE[dtype])


# One row alone, rows of which the product has fewer numbers than the weight, and many; wider than
# tall, and taller than wide.
PROJECTIONS = pytest.mark.parametrize(
    ("rows", "columns"), [((1, 1), F), ((3, 7), F), ((B, T), F), ((B, T), D // 2)]
)


@DTYPES
@PROJECTIONS
def test_project(dtype, rows, columns):
    arguments = numbers(0, *rows, D, dtype=dtype), numbers(1, D, columns)
    weight = arguments[1].astype(dtype)  # as the product reads it
    rounded = lambda f: lambda *x: f(*x[:-1], exact(weight))
    ours = lambda x, w: project(x, w, dtype)
    compare(ours, rounded(by_hand.project), rounded(by_hand.project_backward), arguments, dtype)


@BOTH
@DTYPES
def test_matmul(module, dtype):
    arguments = numbers(0, B * T, D, dtype=dtype), numbers(1, D, F, dtype=dtype)
    compare(
        lambda x, w: module.matmul(x, w, dtype), by_hand.project, by_hand.project_backward, arguments, dtype
    )


@DTYPES
def test_project_each(dtype):
    """Two weights, of different widths."""

    def gradients(dys, x, *weights):
        (dx, dleft), (more, dright) = (
            by_hand.project_backward(dy, x, w) for dy, w in zip(dys, weights, strict=True)
        )
        return dx + more, dleft, dright

    arguments = (
        numbers(0, B * T, D, dtype=dtype),
        numbers(1, D, F, dtype=dtype),
        numbers(2, D, D // 2, dtype=dtype),
    )
    each = lambda x, *weights: [by_hand.project(x, w) for w in weights]
    compare(lambda x, *weights: list(project_each(x, weights, dtype)), each, gradients, arguments, dtype)


def by_tied_head(x, embed, dtype):
    return Plain(embed, axis=0).times(x, dtype)


@DTYPES
@pytest.mark.parametrize("rows", [1, B * T])
@pytest.mark.parametrize(
    "multiply", [layers.matmul_rows, backward.matmul_rows, by_tied_head], ids=["layers", "backward", "any"]
)
def test_matmul_rows(multiply, dtype, rows):
    def gradients(dy, x, embed):
        dx, dweight = by_hand.project_backward(dy, x, embed.T)
        return dx, dweight.T

    arguments = numbers(0, rows, D, dtype=dtype), numbers(1, V, D, dtype=dtype)
    ours = lambda x, embed: multiply(x, embed, F32)
    compare(ours, lambda x, embed: by_hand.project(x, embed.T), gradients, arguments, dtype)


@BOTH
@DTYPES
def test_lookup(module, dtype):
    tokens = tokens_of(0, B, T, vocab=V // 2)  # some come twice
    gradients = lambda dy, embed: [by_hand.lookup_backward(dy, tokens, V)]
    ours = lambda embed: module.lookup(embed, tokens)
    compare(ours, lambda embed: embed[tokens], gradients, (numbers(0, V, D, dtype=dtype),), dtype)


@BOTH
@DTYPES
@pytest.mark.parametrize("gained", [True, False])
def test_rms_norm(module, dtype, gained):
    x, one = numbers(0, B, T, D, dtype=dtype), np.ones(D)
    if gained:
        forward = lambda x, gain: by_hand.rms_norm(x, gain, EPS)
        gradients = lambda dy, x, gain: by_hand.rms_norm_backward(dy, x, gain, EPS)
        compare(
            lambda x, gain: module.rms_norm(x, gain, EPS, dtype),
            forward,
            gradients,
            (x, numbers(1, D)),
            dtype,
        )
    else:
        gradients = lambda dy, x: by_hand.rms_norm_backward(dy, x, one, EPS)[:1]
        compare(
            lambda x: module.rms_norm(x, None, EPS, dtype),
            lambda x: by_hand.rms_norm(x, one, EPS),
            gradients,
            (x,),
            dtype,
        )


@BOTH
@DTYPES
@pytest.mark.parametrize(
    "scaling", [Llama3Scaling(4.0, 1.0, 4.0, 64), YarnScaling(4.0, 64, 1.2, 5.0, 0.5)], ids=["llama3", "yarn"]
)
def test_rope(scaling, module, dtype):
    cfg = ModelConfig(V, D, 1, N, F, 512, K, H, rope_theta=100.0, rope_scaling=scaling)
    positions, scale = positions_of(B, T) + 100, 0.7
    tables = by_hand.rope_tables(cfg, positions, np.dtype("float64"))
    ours = jax.jit(layers.rope_tables, static_argnums=0)(cfg, positions)
    # float32 holds an angle of 160 to 8e-6
    assert_near(ours, [table[:, :, 0] for table in tables], 5e-5)
    cos, sin = (jnp.asarray(table[:, :, 0], F32) for table in tables)
    gradients = lambda dy, x: [by_hand.rope_backward(dy, *tables) * scale]
    forward, x = lambda x: by_hand.rope(x * scale, *tables), numbers(0, B, T, N, H, dtype=dtype)
    compare(lambda x: module.rope(x, cos, sin, scale, dtype), forward, gradients, (x,), dtype)


@BOTH
@DTYPES
def test_swiglu(module, dtype):
    arguments = numbers(0, B, T, F, dtype=dtype, scale=2.0), numbers(1, B, T, F, dtype=dtype)
    ours = lambda gate, up: module.swiglu(gate, up, dtype)
    compare(ours, by_hand.swiglu, by_hand.swiglu_backward, arguments, dtype)


def attention_by_hand(K: int, mask: np.ndarray):
    """(forward, gradients) of attention of q (B, T, N, H), scaled, to k and v (B, T, K, H)."""
    grouped = lambda q, k, v: [by_hand.group_heads(x, K) for x in (q * H**0.5, k, v)]

    def forward(q, k, v):
        queries, keys, values = grouped(q, k, v)
        mixed = by_hand.weighted_values(by_hand.attention_weights(queries, keys, mask), values)
        return by_hand.ungroup_heads(mixed, q.shape[1]).reshape(*q.shape[:2], -1)

    def gradients(dy, q, k, v):
        queries, keys, values = grouped(q, k, v)
        weights = by_hand.attention_weights(queries, keys, mask)
        dweights, dv = by_hand.weighted_values_backward(
            by_hand.group_heads(dy.reshape(q.shape), K), weights, values
        )
        dq, dk = by_hand.attention_weights_backward(dweights, weights, queries, keys)
        return [by_hand.ungroup_heads(x, q.shape[1]) for x in (dq * H**0.5, dk, dv)]

    return forward, gradients


def heads(T: int, K: int, dtype) -> tuple[jax.Array, ...]:
    return tuple(numbers(seed, 2, T, n, H, dtype=dtype, scale=0.5) for seed, n in enumerate((N, K, K)))


@ATTENTION
@DTYPES
@pytest.mark.parametrize(("K", "T", "packed"), [(K, T, True), (N, T, False), (1, T, True), (K, 256, True)])
def test_attention_in_blocks(module, dtype, K, T, packed):
    """In one block of queries, or in two; a row is one text, or three."""
    segments = np.sort(tokens_of(3, 2, T, vocab=3), axis=1) if packed else None
    ours = lambda q, k, v: module.causal_attention(q, k, v, segments)
    compare(ours, *attention_by_hand(K, by_hand.causal_mask(segments, T)), heads(T, K, dtype), dtype)


@ATTENTION
@DTYPES
@pytest.mark.parametrize("K", [K, N])
def test_attention_to_a_cache(module, dtype, K):
    """One query a row, the last: with as many key heads as query heads it is alone in its product."""
    q, k, v = heads(T, K, dtype)
    expected = attention_by_hand(K, by_hand.causal_mask(None, T))[0](*exact((q, k, v)))[:, -1:]
    ours = jax.jit(lambda q, k, v: module.attention(q, k, v, jnp.ones((2, 1, T), bool)))
    assert_near(ours(q[:, -1:], k.swapaxes(1, 2), v.swapaxes(1, 2)), expected, TOLERANCE[dtype])


@pytest.mark.law("gradients")
@pytest.mark.parametrize(
    ("base", "tied"),
    [
        ("plain", True),
        ("int8", False),
        pytest.param("plain", False, marks=pytest.mark.whole),
        pytest.param("int8", True, marks=pytest.mark.whole),
    ],
)
def test_the_step_of_a_model_and_of_an_adapter_at_its_start(base, tied, monkeypatch):
    """Loss and gradient, with the logits at once, a chunk of the vocabulary at a time, or a few
    rows; over int8 weights too.
    """
    cfg = ModelConfig(
        V, D, 2, N, F, 512, N if tied else K, H, tied=tied, qkv_bias=tied, qk_norm=not tied, dtype="float32"
    )
    params, head = lively_params(cfg), "embed" if tied else "head"
    params |= {head: params[head].astype(BF16).astype(F32)}
    # A head in another type than float32 is a frozen one.
    frozen = quantize(params, "full") if base == "int8" else params | {head: params[head].astype(BF16)}
    params = map_paths(lambda _, leaf: leaf.dense() if isinstance(leaf, Int8) else leaf.astype(F32), frozen)
    segments, mask = (
        np.sort(tokens_of(3, B, T, vocab=3), axis=1),
        np.random.default_rng(4).random((B, T)) < 0.7,
    )
    batch = Batch(
        tokens_of(0, B, T, vocab=V), tokens_of(1, B, T, vocab=V), mask, positions_of(B, T) + 9, segments
    )
    expected = by_hand_gradient(cfg, exact(params), *batch)
    run = lambda *trees: jax.jit(functools.partial(loss_and_gradient, cfg))(*trees, batch)
    if base == "plain":
        assert_near(run(params, {}), expected, 2e-5)
        monkeypatch.setattr(loss, "LOGITS_LIMIT", 0)
        monkeypatch.setattr(loss, "CHUNK", 256)
        assert_near(run(params, {}), expected, 2e-5)
    monkeypatch.setattr(loss, "ROWS_LIMIT", 4 * V * 100)
    value, gradient = run(init_lora(cfg, jax.random.key(0), LoraConfig(rank=4)), frozen)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    adapters, slopes = (
        leaf_paths(init_lora(cfg, jax.random.key(0), LoraConfig(rank=4))),
        leaf_paths(expected[1]),
    )
    for path, leaf in leaf_paths(gradient).items():
        assert not leaf.a.any(), "where b is 0, a has no slope"
        assert_near(leaf.b, adapters[path].scale * exact(adapters[path].a).T @ slopes[path], 5e-5)


def test_the_comparison_sees_a_wrong_slope():
    wrong = jax.custom_vjp(lambda x: 3 * x)
    wrong.defvjp(lambda x: (3 * x, None), lambda _, g: (3.0001 * g,))
    by_hand_triple = lambda x: 3 * x, lambda dy, x: [3 * dy]
    compare(lambda x: 3 * x, *by_hand_triple, (numbers(0, B, T),), F32)
    with pytest.raises(AssertionError):
        compare(wrong, *by_hand_triple, (numbers(0, B, T),), F32)

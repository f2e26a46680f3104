"""What platforms compute in their own way: the choice, and each fused kernel against the layers on paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.model import attention, layers, ops
from engine.model.attention_in_blocks import QUERY_BLOCK
from engine.model.transformer import forward
from engine.text.batch import Batch
from engine.training.step import loss_and_gradient
from tests.rounding import norm_gain, sums_apart
from tests.tiny import FAMILY, assert_near, lively_params, normal, positions_of, tiny_config, tokens_of


def test_a_program_is_traced_for_jaxs_default_device():
    """JAX keys its traces by the default device, so one function has a program for each platform."""
    assert ops.platform() == "cpu"
    traced, shape = [], jax.ShapeDtypeStruct((2, 3), jnp.float32)

    @jax.jit
    def f(x):
        traced.append(ops.platform())
        return ops.transpose(x)

    for platform in ("cpu", "tpu", "gpu", "tpu", "cpu"):
        with jax.default_device(platform):
            text = str(f.trace(shape).jaxpr)
        assert ("layout_constraint" in text) == (platform == "cpu")
    assert traced == ["cpu", "tpu", "gpu"]


@pytest.mark.law("layout equivalence")
@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(name, marks=pytest.mark.whole) for name in ("llama3", "qwen2"))]
)
def test_other_platforms_compute_what_a_cpu_computes(name, monkeypatch):
    """The logits, the loss and its gradient by every leaf, in float32: to a share of the largest
    number.
    """
    cfg = FAMILY[name]
    params, rows = lively_params(cfg), (3, 2 * QUERY_BLOCK)
    segments = np.sort(np.random.default_rng(0).integers(0, 3, rows), axis=1).astype(np.int32)
    batch = Batch(tokens_of(1, *rows), tokens_of(2, *rows), segments > 0, positions_of(*rows), segments)
    both = []
    logits = lambda params: forward(cfg, params, batch.tokens, batch.positions, segments=segments)[0]
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(ops, "platform", lambda platform=platform: platform)
        both.append(
            jax.jit(lambda params: (logits(params), loss_and_gradient(cfg, params, {}, batch)))(params)
        )
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(both[0])), "nothing to compare"
    assert_near(*both, tolerance_of(cfg, *rows))


def tolerance_of(cfg, rows, tokens):
    """Returns how far two paths through a model and back may be apart in float32, as a share of a
    leaf's largest number.

    A block's sums run over width, heads and keys, once forward and twice backward. The gradient of
    a weight is one over tokens.
    """
    block = (cfg.width, cfg.head_dim, tokens, cfg.heads * cfg.head_dim, cfg.width, cfg.ff)
    share = sums_apart(rows * tokens, *3 * cfg.layers * block, *3 * (cfg.width,), cfg.vocab)
    if cfg.qk_norm:
        return share * norm_gain(rows * tokens * cfg.heads, cfg.head_dim)
    return share * norm_gain(rows * tokens, cfg.width)


@pytest.mark.parametrize(("T", "K", "packed"), [(128, 2, False), (256, 1, True)])
def test_splash_attention_is_attention(T, K, packed):
    """Value, and gradient by queries, keys and values, of the TPU's kernel in interpret mode."""
    q, k, v = normal(0, 2, T, 2, 8), normal(1, 2, T, K, 8), normal(2, 2, T, K, 8)
    segments = (
        jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (2, T)), axis=1)) if packed else None
    )
    mixing = normal(4, 2, T, 16)
    splash = lambda *qkv: ops.splash(*qkv, segments, interpret=True)
    plain = lambda *qkv: layers.causal_attention(*qkv, segments)
    slope = lambda f: jax.jit(jax.value_and_grad(lambda *qkv: (f(*qkv) * mixing).sum(), (0, 1, 2)))(q, k, v)
    results = slope(splash), slope(plain)
    assert_near(*results, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_is_asked_for_attention(monkeypatch, packed):
    """With XLA's own attention in place of cuDNN's: value and gradient of `cudnn`, and of
    `cudnn_masked` over a cache.
    """
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **o: plain(*a, implementation="xla", **o)
    )
    q, k, v = normal(0, 2, 10, 6, 4), normal(1, 2, 10, 3, 4), normal(2, 2, 10, 3, 4)
    segments = (
        jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (2, 10)), axis=1)) if packed else None
    )
    mixing = normal(4, 2, 10, 24)
    results = [
        jax.value_and_grad(lambda *qkv, f=f: (f(*qkv, segments) * mixing).sum(), (0, 1, 2))(q, k, v)
        for f in (ops.cudnn, layers.causal_attention)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *results)
    mask = jnp.asarray(np.random.default_rng(5).random((2, 4, 10)) < 0.5).at[..., 0].set(True)
    expected = layers.attention(q[:, :4], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    np.testing.assert_allclose(ops.cudnn_masked(q[:, :4], k, v, mask), expected, atol=1e-5)
    assert ops.cudnn_masked(q[:, :3], k, v, mask[:, :3]) is None, "cuDNN refuses an odd length with a mask"


@pytest.mark.whole
def test_a_model_on_a_tpu_computes_what_a_cpu_computes(monkeypatch):
    """Splash attention in interpret mode inside a model whose layers are a scan, at a length that
    needs padding.
    """
    rows, results = (2, 40), []
    for platform, cfg in (("cpu", tiny_config()), ("tpu", tiny_config(scan=True, remat="block"))):
        kernel = functools.partial(ops.splash, interpret=True)
        monkeypatch.setitem(ops.PLATFORMS, "tpu", ops.PLATFORMS["tpu"]._replace(fused_attention=kernel))
        monkeypatch.setattr(ops, "platform", lambda platform=platform: platform)
        segments = np.sort(np.random.default_rng(0).integers(0, 3, rows), axis=1).astype(np.int32)
        batch = Batch(tokens_of(1, *rows), tokens_of(2, *rows), segments > 0, positions_of(*rows), segments)
        step = jax.jit(lambda params, cfg=cfg, batch=batch: loss_and_gradient(cfg, params, {}, batch))
        results.append(step(lively_params(cfg)))
    assert_near(*results, tolerance_of(tiny_config(), *rows))


def test_a_kernel_leaves_what_it_cannot_serve(monkeypatch):
    """Where there is no cuDNN and no compiler, attention in blocks takes all, and memory is
    predicted so.
    """
    q, k = normal(0, 1, 130, 2, 8), normal(1, 1, 130, 1, 8)
    assert ops.cudnn(q, k, k, None) is None
    monkeypatch.setattr(ops, "native_problem", lambda: "there is no compiler")
    note = "; decoding would be faster with the kernels in C, but there is no compiler"
    for device, path, said in (
        ("cpu", "by XLA", note),
        ("gpu", "by XLA", ""),
        ("tpu", "by a fused kernel", ""),
    ):
        with jax.default_device(device):
            assert attention.attention_path(FAMILY["qwen3"], 130) == path
            assert ops.kernels_note() == said

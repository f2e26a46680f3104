"""The reference, prefill and decode: in pieces or at once, step by step or several, it is reading the whole text anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.inference.decode import CHUNK, STEPS, decode_steps, generate, prefill, prepare_params
from engine.inference.engine import complete
from engine.inference.request import SamplingParams
from engine.inference.sampling import sample
from engine.model.config import JOINED
from engine.model.loss import score
from engine.model.paths import leaf_paths
from engine.model.transformer import forward, make_cache
from engine.text.batch import Batch
from tests.tiny import positions_of, sampling_of, tiny_config, tokens_of

ROWS = 3
forward_ = jax.jit(forward, static_argnums=0)


def padded(prompts: list[list[int]], width: int) -> np.ndarray:
    return np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts], np.int32)


def texts(*lengths: int) -> list[list[int]]:
    return [tokens_of(n, length).tolist() for n, length in enumerate(lengths)]


def cached(cache) -> list[np.ndarray]:
    return [np.array(layer) for layer in (*cache.k, *cache.v)]


@pytest.mark.law("cache equivalence")
def test_a_prompt_in_pieces_is_the_prompt_at_once_and_a_row_without_tokens_stays(cfg, params):
    prompts, lengths = texts(10, 5, 7), np.array([10, 5, 7], np.int32)
    expected, cache = prefill(cfg, params, padded(prompts, 10), lengths, make_cache(cfg, ROWS, 20))
    whole, _ = forward_(cfg, params, padded(prompts, 10), positions_of(ROWS, 10))
    np.testing.assert_allclose(expected, whole[np.arange(ROWS), lengths - 1], rtol=0, atol=1e-5)
    pieces = make_cache(cfg, ROWS, 20)
    for start in (0, 5):
        before = cached(pieces)
        counts = np.clip(lengths - start, 0, 5)
        logits, pieces = prefill(cfg, params, padded(prompts, 10)[:, start : start + 5], counts, pieces)
        for row in np.flatnonzero((counts > 0) & (counts + start == lengths)):
            np.testing.assert_allclose(logits[row], expected[row], rtol=0, atol=1e-5)
    assert cache.length.tolist() == pieces.length.tolist() == lengths.tolist()
    for at_once, pieced, earlier in zip(cached(cache), cached(pieces), before, strict=True):
        np.testing.assert_array_equal(pieced[1, :, :5], earlier[1, :, :5])
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(pieced[row, :, :length], at_once[row, :, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_several_steps_at_once_are_one_step_after_another(cfg, params, temperature):
    sampling = sampling_of(ROWS, temperature=temperature, top_p=0.95, seed=3)
    prompts, lengths = texts(4, 7, 6), np.array([4, 7, 6], np.int32)

    def start():
        logits, cache = prefill(cfg, params, padded(prompts, 10), lengths, make_cache(cfg, ROWS, 20))
        return jax.jit(sample)(logits, cache.length, sampling), cache

    token, cache = start()
    at_once, last = decode_steps(cfg, params, token, cache, sampling)
    token, cache = start()
    written = [[*prompt, int(new)] for prompt, new in zip(prompts, token)]
    for step in range(STEPS):
        logits, cache = prefill(cfg, params, token[:, None], np.ones(ROWS, np.int32), cache)
        whole, _ = forward_(cfg, params, padded(written, 20), positions_of(ROWS, 20))
        np.testing.assert_allclose(logits, whole[np.arange(ROWS), lengths + step], rtol=0, atol=2e-5)
        token = jax.jit(sample)(logits, cache.length, sampling)
        np.testing.assert_array_equal(at_once[:, step], token)
        written = [[*text, int(new)] for text, new in zip(written, token)]
    assert last.length.tolist() == cache.length.tolist() == (lengths + STEPS).tolist()
    for ours, expected in zip(cached(last), cached(cache), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_weights_are_cast_once_and_gains_stay(params):
    cast, leaves = leaf_paths(prepare_params(tiny_config(dtype="bfloat16"), params)), leaf_paths(params)
    for path, leaf in cast.items():
        folder, _, name = path.rpartition("/")
        parts = [leaves[f"{folder}/{part}"] for part in JOINED[name]] if name in JOINED else [leaves[path]]
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim == 2 else jnp.float32)
        np.testing.assert_array_equal(leaf, jnp.concatenate(parts, axis=-1).astype(leaf.dtype))


def test_a_text_is_scored_in_the_bits_that_its_tokens_take_which_training_minimises(cfg, params):
    from engine.model.loss import summed_loss

    B, T = 2, 7
    mask = np.array([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]], bool)
    segments = np.array([[0, 0, 0, 1, 1, 1, 1], [0] * 7], np.int32)
    batch = Batch(tokens_of(0, B, T), tokens_of(1, B, T), mask, positions_of(B, T), segments)
    logits = np.asarray(forward_(cfg, params, batch.tokens, batch.positions, None, segments)[0], float)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bits = -np.log2(np.take_along_axis(probability, batch.targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(score(cfg, params, batch) / np.log(2), bits[mask].sum(), rtol=1e-5)
    loss = jax.jit(functools.partial(summed_loss, cfg))(params, batch)
    np.testing.assert_allclose(score(cfg, params, batch), loss, rtol=1e-6)
    junk = batch._replace(targets=np.where(mask, batch.targets, -1).astype(np.int32))
    assert float(score(cfg, params, junk)) == float(score(cfg, params, batch))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_lone_prompt_of_any_length_goes_on_as_in_an_engine_and_ends_before_its_stop_token(
    cfg, params, temperature
):
    prepared = prepare_params(cfg, params)
    for prompt in (tokens_of(1, 1).tolist(), tokens_of(2, CHUNK + 9).tolist()):
        sampling = SamplingParams(19, temperature, seed=5)
        ((expected, *_),) = complete(cfg, prepared, [prompt], [sampling], cfg.context)
        options = {"temperature": temperature, "seed": 5}
        assert generate(cfg, prepared, prompt, 19, **options) == expected
        stop = expected[11]
        assert (
            generate(cfg, prepared, prompt, 19, **options, stop_token_ids=[stop])
            == expected[: expected.index(stop)]
        )

"""Prefill, decode and generate: in pieces or at once, several steps a dispatch or one, the same tokens come out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_requests import served_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import positions_of, sampling_of, tiny_config, tokens_of

from engine.errors import UserError
from engine.inference.decode import (
    CHUNK,
    LONE_ROWS,
    STEPS,
    decode_alone,
    decode_step,
    decode_steps,
    generate,
    prefill,
    prepare_params,
)
from engine.inference.request import SamplingParams
from engine.inference.sampling import sample
from engine.inference.score import score
from engine.inference.sequence import Sequence
from engine.model.cache.contiguous import make_cache
from engine.model.transformer import forward
from engine.text.batch import Batch

ROWS, CAPACITY = 3, 150
forward_ = jax.jit(forward, static_argnums=0)


def padded(prompts: list[list[int]], width: int) -> np.ndarray:
    return np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts], np.int32)


def texts(*lengths: int) -> list[list[int]]:
    return [tokens_of(n, length).tolist() for n, length in enumerate(lengths)]


def continuations(cfg, params, prompts, capacity=CAPACITY, **sampling) -> tuple[list[list[int]], list[str | None]]:
    """(tokens, why they end) of each prompt; nothing comes after the end."""
    outputs, reasons = [[] for _ in prompts], [None for _ in prompts]
    rows = SamplingParams(**{"max_tokens": 20, "temperature": 0.0, **sampling}).per_row(len(prompts))
    for part in generate(cfg, params, prompts, rows, capacity=capacity):
        assert reasons[part.id] is None, "nothing comes after the end"
        assert part.tokens or part.finish_reason
        outputs[part.id] += part.tokens
        reasons[part.id] = part.finish_reason
    assert None not in reasons
    return outputs, reasons


def read_anew(cfg, params, prompts, count: int) -> list[list[int]]:
    """The greedy continuations by reading each text anew, whole and without a cache, for each of its tokens."""
    texts = [list(prompt) for prompt in [*prompts, [0], [0]][:ROWS]]
    for _ in range(count):
        logits, _ = forward_(cfg, params, padded(texts, CAPACITY), positions_of(len(texts), CAPACITY))
        for row, text in enumerate(texts):
            text.append(int(logits[row, len(text) - 1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


def test_generating_is_reading_the_whole_text_anew_for_every_token(cfg, params):
    """Prompts of one token, of a chunk to the token, and of more than two chunks."""
    prompts = texts(1, CHUNK, 2 * CHUNK + 3)
    outputs, reasons = continuations(cfg, params, prompts, max_tokens=19)
    assert outputs == read_anew(cfg, params, prompts, 19)
    assert reasons == ["length"] * 3
    assert len({tuple(output) for output in outputs}) == 3


def cached(cache) -> list[np.ndarray]:
    return [np.array(layer) for layer in (*cache.k, *cache.v)]


def test_a_prompt_in_pieces_is_the_prompt_at_once_and_a_row_without_tokens_stays(cfg, params):
    prompts, lengths = texts(10, 5, 7), np.array([10, 5, 7], np.int32)
    expected, cache = prefill(cfg, params, padded(prompts, 10), lengths, make_cache(cfg, ROWS, 20))
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
    prompts, lengths = padded(texts(4, 7, 6), 10), np.array([4, 7, 6], np.int32)

    def start():
        logits, cache = prefill(cfg, params, prompts, lengths, make_cache(cfg, ROWS, 20))
        return jax.jit(sample)(logits, cache.length, sampling), cache

    token, cache = start()
    at_once, last = decode_steps(cfg, params, token, cache, sampling)
    token, cache = start()
    for step in range(STEPS):
        logits, cache = decode_step(cfg, params, token, cache)
        token = jax.jit(sample)(logits, cache.length, sampling)
        np.testing.assert_array_equal(at_once[:, step], token)
    assert last.length.tolist() == cache.length.tolist() == (lengths + STEPS).tolist()
    for ours, expected in zip(cached(last), cached(cache), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_completion_ends_before_its_end_token_or_at_its_length(cfg, params):
    prompts = texts(1, CHUNK, 9)
    free, _ = continuations(cfg, params, prompts)
    # sampled from the prefill, in the middle of a dispatch, in the second one; and several at once
    for ends in (*({free[1][place]} for place in (0, 3, 11)), {free[1][11], free[1][3], 41}):
        outputs, reasons = continuations(cfg, params, prompts, stop_token_ids=ends)
        for output, unbounded, reason in zip(outputs, free, reasons):
            place = min((unbounded.index(end) for end in ends if end in unbounded), default=None)
            assert (output, reason) == (unbounded[:place], "length" if place is None else "stop")
        assert reasons[1] == "stop"
    for length in (1, STEPS, STEPS + 1, STEPS + 2):
        outputs, reasons = continuations(cfg, params, prompts, max_tokens=length)
        assert (outputs, reasons) == ([output[:length] for output in free], ["length"] * 3)
    place = max(map(free[0].index, free[0]))
    for length, reason in ((place, "length"), (place + 1, "stop")):
        assert continuations(cfg, params, prompts, max_tokens=length, stop_token_ids={free[0][place]})[1][0] == reason


def test_a_completion_ends_where_the_context_is_full(cfg, params):
    """Each row at its own place; and its last tokens are the ones it would have with room to spare."""
    prompts = texts(140, 149, 3)
    outputs, reasons = continuations(cfg, params, prompts, max_tokens=30)
    assert [len(output) for output in outputs] == [10, 1, 30]
    assert reasons == ["length"] * 3
    roomy, _ = continuations(cfg, params, prompts, max_tokens=30, capacity=190)
    assert outputs == [output[:length] for output, length in zip(roomy, (10, 1, 30))]
    assert continuations(cfg, params, prompts, max_tokens=30, capacity=None)[0] == outputs, "by default it is the model's"


def test_tokens_come_as_they_are_sampled(cfg, params):
    """The first one from the prefill, the others STEPS at a time: nobody waits for the whole."""
    prompts, sampling = texts(5, 2, 9), SamplingParams(max_tokens=STEPS + 4, temperature=0.0).per_row(3)
    parts = list(generate(cfg, params, prompts, sampling, capacity=CAPACITY))
    assert [(part.id, len(part.tokens)) for part in parts] == [
        (0, 1), (1, 1), (2, 1), (0, STEPS), (1, STEPS), (2, STEPS), (0, 3), (1, 3), (2, 3),
    ]  # fmt: skip


def test_a_lone_prompt_is_completed_as_beside_others(cfg, params):
    prompts = texts(CHUNK + 3)
    beside = continuations(cfg, params, [*prompts, [3]], temperature=1.0, seed=8)[0]
    assert continuations(cfg, params, prompts, temperature=1.0, seed=8)[0] == beside[:1]
    assert continuations(cfg, params, prompts)[0] == read_anew(cfg, params, prompts, 20)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_token_has_the_bits_it_has_beside_any_draft_and_in_a_longer_dispatch(weights):
    cfg, params = served_model(weights)
    prompt, sampling = padded(texts(9), 9), sampling_of(LONE_ROWS, temperature=0.0)

    def decode(*dispatches: tuple[int, int]) -> tuple[list[int], list[bytes]]:
        """Decodes a token with a draft beside it, or several in one dispatch; the keys and values of those alone."""
        logits, cache = prefill(cfg, params, prompt, np.array([9], np.int32), make_cache(cfg, 1, 20))
        out = [int(logits.argmax())]
        for draft, steps in dispatches:
            cache = cache._replace(length=np.array([8 + len(out)], np.int32))
            sampled, cache = decode_alone(cfg, params, np.array([[out[-1], draft]], np.int32), cache, sampling, np.int32(steps))
            out += np.asarray(sampled)[:steps, 0].tolist()
        return out, [layer[:, :, : 8 + len(out)].tobytes() for layer in cached(cache)]

    expected = decode((3, 4))
    for drafts in ((3, 3, 3, 3), (7, 0, 40, 11), [*expected[0][2:], 5]):
        assert decode(*((draft, 1) for draft in drafts)) == expected
    assert decode((5, 2), (9, 1), (6, 1)) == expected


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@settings(max_examples=15)
@given(st.data(), st.sampled_from([0.0, 1.0]), st.integers(0, 9))
def test_drafts_change_no_token_of_a_lone_completion(weights, data, temperature, seed):
    """Whatever is drafted wherever: nothing, a wrong token, or the right one."""
    cfg, params = served_model(weights)
    sampling, at = {"temperature": temperature, "seed": seed, "max_tokens": 14}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequence, "draft_tokens", lambda self, count: None)
        plain = continuations(cfg, params, texts(5), **sampling)

        def draft(sequence, count):
            at.append(len(sequence.output_tokens))
            return data.draw(st.sampled_from([None, [], [3][:count], plain[0][0][at[-1] :][:count]]))

        patch.setattr(Sequence, "draft_tokens", draft)
        assert continuations(cfg, params, texts(5), **sampling) == plain
    assert at


def test_after_the_first_call_nothing_is_compiled(cfg, params, count_compiles):
    """Lengths of one chunk or three, any sampling, any stop token, with draft tokens and without. (No other has its room.)"""
    sampling, changed = {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 99}
    four = [texts(3, 2, 4, 1), texts(1, 1, 1, 1), texts(CHUNK, 3, 5, 1), texts(2 * CHUNK + 9, 1, 9, 7)]
    alone = [texts(3), texts(CHUNK), texts(2 * CHUNK + 9), [[5, 6] * 9]]
    for first, *others in (four, alone):
        before = len(count_compiles)
        continuations(cfg, params, first, max_tokens=12, capacity=200, **sampling)
        compiled = len(count_compiles)
        assert compiled > before + 1, "the count counts"
        for prompts in others:
            for options in (sampling, changed, {"temperature": 0.0}):
                continuations(cfg, params, prompts, max_tokens=30, capacity=200, stop_token_ids=[7], **options)
        assert len(count_compiles) == compiled


@pytest.mark.parametrize(
    ("prompts", "rows", "fields", "message"),
    [
        ([[1], [], [2]], 3, {}, "Prompt 1 has 0 tokens"),
        ([[1], [2], [3] * 150], 3, {}, "Prompt 2 has 150 tokens; from 1 to 149 fit"),
        ([[1], [41], [3]], 3, {}, "Prompt 1 holds a token outside the vocabulary of 41"),
        ([[-1], [1], [3]], 3, {}, "Prompt 0 holds a token outside"),
        ([], 0, {}, "0 and 0 came"),
        ([[1], [2], [3]], 2, {}, "3 and 2 came"),
        ([[1]], 1, {"logprobs": 0}, "Engine"), ([[1]], 1, {"presence_penalty": 0.1}, "Engine"),
        ([[1]], 1, {"logit_bias": {1: 1.0}}, "Engine"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_continued_are_refused(cfg, params, prompts, rows, fields, message):
    with pytest.raises(UserError, match=message):
        next(generate(cfg, params, prompts, SamplingParams(**fields).per_row(rows)))


def test_weights_are_cast_once_and_gains_stay(params):
    cast = prepare_params(tiny_config(dtype="bfloat16"), params)
    for leaf, other in zip(jax.tree.leaves(cast), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim == 2 else jnp.float32)
        np.testing.assert_array_equal(leaf, other.astype(leaf.dtype))


def test_a_text_is_scored_in_the_bits_that_its_tokens_take_which_training_minimises(cfg, params):
    from engine.training.loss import summed_loss

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

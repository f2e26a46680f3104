"""Engine: many requests at once, each as if it were alone, to the bit; and none overflows or stays behind."""

import dataclasses

import jax
import numpy as np
import pytest

from engine.errors import UserError
from engine.inference.config import EngineConfig
from engine.inference.constraints import ForcedTokens
from engine.inference.decode import prefill, prepare_params
from engine.inference.drafts import Drafter
from engine.inference.engine import Engine
from engine.inference.engine import complete as complete_all
from engine.inference.prefix_cache import PrefixCache
from engine.inference.request import Completion, Request, SamplingParams
from engine.inference.sampling import sample, sampling_arrays
from engine.inference.scheduler import STEPS, Decode, Scheduler
from engine.model import ops
from engine.model.transformer import forward, make_cache
from tests.inference.engine_requests import (
    AS_SERVED,
    CAPACITY,
    CHUNK,
    DTYPES,
    REPEATING,
    REQUESTS,
    SLOTS,
    TAIL,
    Log,
    attends_by_xla,
    complete,
    complete_alone,
    make_engine,
    poison,
    served_model,
    text,
)
from tests.tiny import lively_params, positions_of, request_of, tiny_config

forward_, sample_ = jax.jit(forward, static_argnums=0), jax.jit(sample)


def plain_completion(cfg, params, prompt: list[int], sampling: SamplingParams) -> Completion:
    """The completion by the reference: prefill, then one step after another."""
    padded = np.array([[*prompt, *[0] * (CAPACITY - len(prompt))]], np.int32)
    logits, cache = prefill(
        cfg, params, padded, np.array([len(prompt)], np.int32), make_cache(cfg, 1, CAPACITY)
    )
    tokens, arrays = [], sampling_arrays([sampling])
    while True:
        (token,) = np.asarray(sample_(logits, cache.length, arrays)).tolist()
        if token in sampling.stop_token_ids:
            return Completion(tokens, "stop", token)
        tokens.append(token)
        if len(tokens) == sampling.max_tokens:
            return Completion(tokens, "length", None)
        logits, cache = prefill(cfg, params, np.array([[token]], np.int32), np.array([1], np.int32), cache)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0, "stop_token_ids": (3, 7)}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}]
)
def test_completions_are_those_of_the_reference(fields, count_compiles):
    """Alone and together, up to a stop token, `max_tokens` or the capacity, around the edges of
    chunks and segments; and only the first call compiles anything.
    """
    cfg, params = served_model("float32")
    prompts = [text(seed, length) for seed, length in enumerate((1, 2, 16, 17, 48, CAPACITY - 1, 50))]
    most = (CAPACITY, 1, STEPS, 1, CAPACITY, CAPACITY, 20)
    rows = [
        dataclasses.replace(row, max_tokens=min(count, CAPACITY - len(prompt)))
        for prompt, count, row in zip(prompts, most, SamplingParams(20, **fields).per_row(7))
    ]
    expected = [plain_completion(cfg, params, prompt, row) for prompt, row in zip(prompts, rows)]
    assert {completion.finish_reason for completion in expected} == {
        "length",
        *["stop"] * ("stop_token_ids" in fields),
    }
    for count in (7, 1):
        complete_all(cfg, params, prompts[-count:], rows[-count:], CAPACITY)
        count_compiles.clear()
        for start in range(0, 7, count):
            part = slice(start, start + count)
            reports = []
            report = lambda *counts, reports=reports: reports.append(counts)
            assert complete_all(cfg, params, prompts[part], rows[part], CAPACITY, report) == expected[part]
            assert reports[0] == (0, count)
            assert reports == sorted(reports)
        assert count_compiles == []


@pytest.mark.parametrize("dtype", ["float32", AS_SERVED])
def test_rows_that_check_drafts_read_what_their_sequence_reads(dtype, monkeypatch):
    """A lone text reaches long segments with wrong drafts, loses its rows to others, and gets new
    ones as a short text.
    """
    check_drafts_of_a_growing_text(dtype, monkeypatch)


@pytest.mark.law("isolation")
@pytest.mark.parametrize("dtype", ["float32", pytest.param(AS_SERVED, marks=pytest.mark.night)])
def test_copies_in_new_slots_hold_all_that_a_call_may_see(dtype, monkeypatch):
    """The same where rows cannot share a slot."""
    with attends_by_xla():
        check_drafts_of_a_growing_text(dtype, monkeypatch)


def check_drafts_of_a_growing_text(dtype, monkeypatch):
    request = request_of(text(5, 9), 45, temperature=0.0, logprobs=3)
    expected, drafts_at = complete_alone(dtype, request), {}
    right = [*request.prompt, *expected.tokens]

    def draft(self, count: int) -> list[int]:
        many, are_right = drafts_at.get(
            len(self._text) - 1, (1, False) if len(self._text) < 30 else (0, True)
        )
        return [(token + (not are_right)) % 41 for token in right[len(self._text) :][: min(many, count)]]

    monkeypatch.setattr(Drafter, "draft", draft)
    engine = make_engine(dtype)
    poison(engine, np.nan)
    log = Log(engine)
    id = log.submit(request)
    edge = 2 * CHUNK  # where XLA's second segment ends
    drafts_at[edge - 3] = 3, False
    while not engine.scheduler.decoding or engine.scheduler.decoding[0].position < edge - 2:
        log.step()
    others = [log.submit(request_of(text(seed, 40), 5)) for seed in (1, 2)]
    log.step()
    for other in others:
        engine.cancel(other)
    drafts_at |= {edge - 2: (1, False)} | dict.fromkeys(range(edge - 1, 60), (3, True))
    log.drain()
    assert log.completion(id) == expected


def test_candidates_to_one_prompt_are_decoded_together():
    """Copied from the prefix cache in one step, their tokens checked in all rows that are free; to
    the bit as each alone.
    """
    engine, prompt = make_engine("float32", prefix_cache_bytes=10**7), text(1, 33)
    engine.warm()
    candidates = [
        request_of(prompt, 4, constraint=ForcedTokens(text(seed, 4)), temperature=0.0, logprobs=0)
        for seed in range(SLOTS - 2)
    ]
    alone = make_engine("float32", speculate=False)
    expected = [completion for request in candidates for completion in complete(alone, [request])]
    assert complete(engine, candidates[:1]) == expected[:1]
    ids, steps = [engine.submit(request) for request in candidates], engine.steps_decoded
    other = engine.submit(request_of(text(4, 40), 4))
    engine.step()
    assert len(engine.scheduler.decoding) == len(ids)
    assert [sequence.prefilled_tokens for sequence in engine.scheduler.prefilling] == [0], (
        "what must be computed has its turn"
    )
    engine.cancel(other)
    while engine.busy:
        engine.step()
    assert engine.steps_decoded - steps < 4 or not engine.config.backend.in_c
    assert complete(engine, candidates) == expected


@pytest.mark.law("cache equivalence")
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=[pytest.mark.night] * (dtype != "float32")) for dtype in DTYPES]
)
def test_a_prefix_cache_hit_changes_no_bit(dtype):
    """A prompt again, to its last part; one that goes on from it or leaves it inside a chunk, as
    far as tails pay off.
    """
    engine = make_engine(dtype, prefix_cache_bytes=10**7)
    engine.warm()
    assert engine.tails_are_exact, "on this machine a token's bits do not depend on the size of the program"
    assert bool(engine.few_rows) == (engine.config.backend.in_c and dtype == AS_SERVED)
    log, prompt, other = Log(engine), text(1, 60), text(5, 60)

    def cached_tokens(*prompts, **more) -> list[int]:
        requests = [request_of(tokens, 2, seed=3, logprobs=20, **more) for tokens in prompts]
        ids = [log.submit(request) for request in requests]
        log.drain()
        assert [log.completion(id) for id in ids] == [complete_alone(dtype, request) for request in requests]
        return [log.events[id][-1].cached_tokens for id in ids]

    assert cached_tokens(prompt[:52]) == [0]
    assert cached_tokens(*[prompt[:52]] * 3) == [51] * 3
    assert cached_tokens(prompt[:52], namespace="key") == [0]
    assert cached_tokens(prompt) == [48], "a part below a tail is found whole or not at all"
    assert cached_tokens(prompt, prompt[:58]) == [59, 56]
    assert cached_tokens(prompt[:30], prompt[:23], prompt[:21], prompt[:14]) == [28, 20, 20, 12]
    assert cached_tokens((*prompt[:40], *other[:20])) == [40]
    assert cached_tokens((*prompt[:36], *other[:24])) == [32], "more tails than a whole chunk costs"
    assert engine.prefix_cache.bytes <= engine.prefix_cache.limit
    engine.tails_are_exact = False
    engine.prefix_cache = PrefixCache(10**7)
    assert [cached_tokens(tokens) for tokens in (prompt[:52], prompt[:52], prompt, prompt[:30])] == [
        [0],
        [51],
        [48],
        [16],
    ]


BY_DAY = [("float32", 0.0, SLOTS), ("float32", 0.3, SLOTS), ("float32", 0.3, 1), ("int8", 0.3, SLOTS)]
AT_NIGHT = sorted({(dtype, *case[1:]) for dtype in DTYPES for case in BY_DAY} - {*BY_DAY})


@pytest.mark.law("speculation")
@pytest.mark.parametrize(
    ("dtype", "temperature", "slots"),
    [*BY_DAY, *(pytest.param(*case, marks=pytest.mark.night) for case in AT_NIGHT)],
)
def test_drafts_change_when_tokens_come_and_not_which(dtype, temperature, slots, monkeypatch):
    """A text that repeats itself, and one whose every draft is wrong; in one slot, two rows share
    it and need no copy.
    """
    request = request_of(REPEATING, 29, temperature=temperature, seed=2, logprobs=3)
    (expected,), checked = complete(make_engine(dtype, slots=slots, speculate=False), [request]), []
    right = [*request.prompt, *expected.tokens]
    schedule = Scheduler.schedule

    def noted(self):
        step = schedule(self)
        checked.append(isinstance(step, Decode) and len(step.drafts) > 0)
        return step

    def dispatches_with_drafts(change=None) -> int:
        """Completes the request, with each right draft token `change`d by its place."""
        checked.clear()
        if change:
            changed = lambda self, count: [
                change(n, token) for n, token in enumerate(right[len(self._text) :][:count])
            ]
            monkeypatch.setattr(Drafter, "draft", changed)
        assert complete(make_engine(dtype, slots=slots), [request]) == [expected]
        return sum(checked)

    monkeypatch.setattr(Scheduler, "schedule", noted)
    dispatches_with_drafts()
    most = -(-28 // (4 if slots > 1 else 2))
    assert 0 < dispatches_with_drafts(lambda n, token: token) <= most, (
        "the drafts and a token of its own come true"
    )
    assert dispatches_with_drafts(lambda n, token: (token + 1) % 41) >= 20, "no draft comes true"
    dispatches_with_drafts(lambda n, token: 0 if n % 2 else token)


@pytest.mark.law("no compiles")
def test_nothing_is_compiled_after_warm(count_compiles):
    """With one row for drafts, not three; weights on a device that is not named, and on one that
    is.
    """
    params = served_model("float32")[1]
    jax.clear_caches()  # of what other tests have compiled
    for weights in (params, jax.device_put(params, jax.devices()[0])):
        engine = make_engine("float32", params=weights, slots=1, prefix_cache_bytes=10**6)
        count_compiles.clear()
        engine.warm()
        assert weights is not params or len(count_compiles) >= 8, "the count counts"
        count_compiles.clear()
        log = Log(engine)
        ids = [log.submit(request) for request in REQUESTS[:20]]
        with pytest.raises(ValueError, match="without requests"):
            engine.warm()
        for _ in range(6):
            log.step()
        engine.cancel(ids[1]), engine.cancel(ids[-1])
        log.drain()
        request = request_of(REPEATING, 29, temperature=0.0, logprobs=20)
        (completion,) = complete(engine, [request])
        engine.scheduler.speculate = False
        assert complete(engine, [request]) == [completion]
        assert count_compiles == []


def test_a_chunk_is_computed_before_the_next_is_begun(monkeypatch):
    """JAX hands a program over and goes on: a prompt's chunks, all begun at once, would hold up
    whoever comes meanwhile.
    """
    engine, waited = make_engine("float32"), []
    really = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(tree) or really(tree))
    engine.submit(request_of(text(1, 3 * CHUNK), 4, temperature=0.0))
    for chunk in range(2):
        engine.step()
        assert len(waited) == chunk + 1
        assert waited[-1] is engine.runner.segments


def test_a_short_prompt_is_computed_in_no_more_rows_than_it_needs(monkeypatch):
    engine, sizes = make_engine("float32"), []
    really = engine.runner.prefill
    monkeypatch.setattr(
        engine.runner, "prefill", lambda tokens, *args: sizes.append(tokens.shape[1]) or really(tokens, *args)
    )
    for length, expected in (
        (TAIL, [TAIL]),
        (2 * TAIL, [TAIL] * 2),
        (2 * TAIL + 1, [CHUNK]),
        (CHUNK + TAIL, [CHUNK, TAIL]),
    ):
        sizes.clear()
        request = request_of(
            text(2, length + 1), 2, temperature=0.0, logprobs=3
        )  # of which decoding reads the last
        assert complete(engine, [request]) == [complete_alone("float32", request)]
        assert sizes == expected


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_model_that_gives_no_numbers_ends_requests_and_touches_no_other(monkeypatch, by_kernel):
    """The last token's embedding is NaN: a request with it gets an error, those beside and after it
    their completions.
    """
    if not by_kernel:
        monkeypatch.setattr(ops, "native_problem", lambda: "it is off")
    params = served_model("float32")[1]
    bad = {**params, "embed": params["embed"].at[40].set(np.nan)}
    engine = make_engine("float32", params=bad)
    good = request_of(
        [token % 40 for token in text(4, 26)], 10, temperature=0.0, logit_bias={40: -100.0}, logprobs=2
    )
    spoilt = request_of([40, *text(1, 20)], 10)
    (expected,) = complete(make_engine("float32", params=bad), [good])
    cached = make_engine("float32", params=bad, prefix_cache_bytes=10**6)
    cached.tails_are_exact = True
    complete(cached, [request_of([*good.prompt[:25], *[40] * 8], 1)])
    assert complete(cached, [good]) == [expected], "it begins as a chunk does that ends in NaN"
    assert expected.finish_reason == "length"
    for _ in range(3):
        requests = [spoilt, good, spoilt, spoilt, good, spoilt, good]
        for request, completion in zip(requests, complete(engine, requests), strict=True):
            assert completion == (expected if request is good else ((), (), "error"))


def reference(cfg, params, request: Request, count: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens with penalties and bias, and the plain log-probabilities (V,) at each, in
    NumPy.
    """
    tokens, logprobs, sampling, prompt = list(request.prompt), [], request.sampling, len(request.prompt)
    bias = np.array([sampling.logit_bias.get(token, 0.0) for token in range(cfg.vocab)])
    for _ in range(count):
        padded = np.array([tokens + [0] * (CAPACITY - len(tokens))] * 2, np.int32)
        logits = np.asarray(
            forward_(cfg, params, padded, positions_of(2, CAPACITY))[0][0, len(tokens) - 1], np.float64
        )
        logprobs.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        everywhere, in_output = (
            np.bincount(part, minlength=cfg.vocab) for part in (tokens, np.array(tokens[prompt:], int))
        )
        logits *= np.where(everywhere, sampling.repetition_penalty ** -np.sign(logits), 1)
        logits += bias - sampling.frequency_penalty * in_output - sampling.presence_penalty * (in_output > 0)
        tokens.append(int(logits.argmax()))
    return tokens[prompt:], logprobs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"logit_bias": {3: 100.0}},
        {"logit_bias": {7: -100.0, 9: 1.5}},
        {
            "presence_penalty": -0.5,
            "frequency_penalty": 0.7,
            "repetition_penalty": 1.2,
            "logit_bias": {1: 2.0},
        },
    ],
)
def test_penalties_bias_and_log_probabilities_are_those_of_plain_numpy(changes):
    """In company, whose prompts are prefilled while this one waits or decodes: nothing of it is
    counted.
    """
    cfg, params = served_model("float32")
    request = request_of(text(2, 21), 18, temperature=0.0, logprobs=5, **changes)
    tokens, logprobs = reference(cfg, params, request, 18)
    log = Log(make_engine("float32"))
    for other in REQUESTS[:3]:
        log.submit(other)
    log.step(), log.step()
    id = log.submit(request)
    log.drain()
    assert [*log.completion(id).tokens] == tokens
    ours = [logprob for event in log.events[id] for logprob in event.logprobs]
    for (token, logprob, top), sampled, expected in zip(ours, tokens, logprobs, strict=True):
        best = np.argsort(-expected, kind="stable")[:5].tolist()
        assert (token, [other for other, _ in top]) == (sampled, best)
        values = [logprob, *(value for _, value in top)]
        np.testing.assert_allclose(values, expected[[token, *best]], rtol=0, atol=2e-5)


def test_log_probabilities_of_a_small_vocabulary_are_of_all_of_it():
    cfg = tiny_config(vocab=11)
    config = EngineConfig(2, 20, kv_dtype="float32", chunk=8, tail=4)
    engine = Engine(cfg, prepare_params(cfg, lively_params(cfg)), config)
    (completion,) = complete(engine, [request_of((1, 2), 3, temperature=0.0, logprobs=20)])
    for _, _, top in completion.logprobs:
        assert sorted(token for token, _ in top) == list(range(11))
        assert sum(np.exp(np.frombuffer(value, np.float32)[0]) for _, value in top) == pytest.approx(
            1, abs=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "at least one slot, not 0"),
        ({"capacity": 1}, "between 2 and the model's context of 150, not 1"),
        ({"capacity": 151}, "not 151"),
        ({"tail": 0}, "tail must lie between 1 and the chunk of 16"),
        ({"tail": 17}, "not 17"),
        ({"segment": 24}, "multiple of the chunk of 16, not 24"),
        ({"kv_dtype": "int4"}, "kv_dtype"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes"),
    ],
)
def test_slots_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_engine("float32", **options)


def test_no_stop_token_comes_before_min_tokens():
    everything = tuple(range(1, 41))  # token 0 alone is no end
    engine = make_engine("float32")
    for least in (0, 1, 5, 12):
        request = request_of(
            text(0, 9), 12, temperature=1.0, seed=1, stop_token_ids=everything, min_tokens=least
        )
        (completion,) = complete(engine, [request])
        assert completion.tokens[:least] == (0,) * least
        assert completion.finish_reason == ("length" if len(completion.tokens) == 12 else "stop")
    with pytest.raises(UserError, match="min_tokens is 13, more than max_tokens, 12"):
        request_of(text(0, 9), 12, min_tokens=13)

"""Slots: many at once, each as if it were alone, to the bit; and nobody waits for ever, overflows, or stays behind."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from slot_company import (
    AS_SERVED,
    CAPACITY,
    CHUNK,
    REQUESTS,
    SLOTS,
    WAYS,
    Heard,
    alone,
    made,
    poison,
    requests,
    served,
    text,
)
from tiny import lively_params, positions_of, request_of, tiny_config

from engine.errors import UserError
from engine.inference.decode import for_inference, generate
from engine.inference.programs import STEPS
from engine.inference.request import Request
from engine.inference.sampling_params import SamplingParams
from engine.inference.slots import PATIENCE, Slots, compile_ahead
from engine.inference.speculation import Guesser
from engine.model.transformer import forward

EVERY_WAY = pytest.mark.parametrize("way", WAYS)
forward_ = jax.jit(forward, static_argnums=0)


def answers(slots: Slots, asked: list[Request]) -> list:
    heard = Heard(slots)
    ids = [heard.submit(request) for request in asked]
    heard.drain()
    return [heard.answer(id) for id in ids]


def test_greedy_answers_are_those_of_the_plain_generator():
    cfg, params = served("float32")
    prompts = [text(seed, length) for seed, length in enumerate((1, 2, 16, 17, 18, 33, 50))]
    expected = [[] for _ in prompts]
    for part in generate(cfg, params, prompts, SamplingParams(max_tokens=12, temperature=0.0).per_row(len(prompts))):
        expected[part.prompt] += part.tokens
    found = answers(made("float32"), [request_of(prompt, 12, temperature=0.0) for prompt in prompts])
    assert [list(answer.tokens) for answer in found] == expected


def test_seeded_answers_are_those_of_the_plain_generator():
    cfg, params = served("float32")
    prompts = [text(seed, length) for seed, length in enumerate((3, 20, 40))]
    expected = [[] for _ in prompts]
    for part in generate(cfg, params, prompts, SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=5).per_row(3)):
        expected[part.prompt] += part.tokens
    asked = [request_of(prompt, 20, temperature=0.8, top_p=0.9, seed=5 + n) for n, prompt in enumerate(prompts)]
    assert [list(answer.tokens) for answer in answers(made("float32"), asked)] == expected


@EVERY_WAY
def test_the_same_in_every_slot_alone_or_in_company_to_the_bit(way):
    """Greedy, seeded, and with penalties; a short text and one of four chunks; log-probabilities too."""
    mine = [
        request_of(text(3, 20), 12, temperature=0.0, logprobs=3), request_of(text(4, 50), 12, seed=9, logprobs=20),
        request_of(
            text(6, 33), 12, temperature=0.7, frequency_penalty=0.5, repetition_penalty=1.3, logit_bias={3: 2.0}, seed=1,
            logprobs=0,
        ),
    ]  # fmt: skip
    for request in mine:
        seen = {alone(way, request)}
        for slot in range(SLOTS):
            for company in (0, SLOTS + 2):
                slots = made(way)
                poison(slots, np.nan if slot % 2 else np.inf)
                slots._free = [slot, *(other for other in range(SLOTS) if other != slot)]
                seen.add(answers(slots, [request, *REQUESTS[slot : slot + company]])[0])
        assert len(seen) == 1


@EVERY_WAY
def test_the_order_of_arrival_does_not_matter(way):
    asked = REQUESTS[:12]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(asked))
        slots = made(way, prefixes=10**6 * (seed % 2))
        heard = Heard(slots)
        ids = {}
        for place in order:
            ids[place] = heard.submit(asked[place])
            for _ in range(seed):
                heard.step()
        heard.drain()
        for place, request in enumerate(asked):
            assert heard.answer(ids[place]) == alone(way, request)


@EVERY_WAY
def test_a_chunk_found_computed_changes_no_bit(way):
    slots = made(way, prefixes=10**7)
    heard = Heard(slots)
    request = request_of(text(1, 52), 10, seed=3, logprobs=20)
    first = heard.submit(request)
    heard.drain()
    again = [heard.submit(request) for _ in range(3)]
    other = heard.submit(request_of(text(1, 52), 10, seed=3, logprobs=20, namespace="key"))
    heard.drain()
    assert heard.cached[first] == heard.cached[other] == 0
    assert all(heard.cached[id] == 3 * CHUNK for id in again)
    assert {heard.answer(id) for id in (first, other, *again)} == {alone(way, request)}
    assert slots.prefixes.bytes <= slots.prefixes.limit


def test_a_cache_too_small_for_a_prompt_keeps_its_beginning():
    size = made("float32", prefixes=10**7)
    answers(size, [request_of(text(1, CHUNK + 1), 1)])
    slots = made("float32", prefixes=2 * size.prefixes.bytes)
    request = request_of(text(1, 52), 10, seed=3)
    heard = Heard(slots)
    for _ in range(2):
        last = heard.submit(request)
        heard.drain()
    assert heard.cached[last] == 2 * CHUNK
    assert len(slots.prefixes) == 2


class Company(RuleBasedStateMachine):
    """Any requests come, any are cancelled, at any moment, while what is free is filled with rubbish: and each that is
    let finish is answered what it is answered alone."""

    ids = Bundle("ids")
    way = "float32"

    @initialize(prefixes=st.sampled_from([0, 20_000, 10**6]), guesses=st.booleans())
    def begin(self, prefixes: int, guesses: bool) -> None:
        self.slots = made(self.way, prefixes=prefixes, guesses=guesses)
        self.heard, self.asked, self.cancelled = Heard(self.slots), {}, set()

    @rule(target=ids, request=requests)
    def submit(self, request: Request) -> int:
        id = self.heard.submit(request)
        self.asked[id] = request
        return id

    @rule(request=requests)
    def submit_too_much(self, request: Request) -> None:
        before = self.slots.busy, len(self.slots.waiting)
        with pytest.raises(UserError, match=f"at most {CAPACITY} fit"):
            self.slots.submit(request_of(request.prompt, CAPACITY + 1 - len(request.prompt)))
        assert (self.slots.busy, len(self.slots.waiting)) == before

    @rule(id=consumes(ids))
    def cancel(self, id: int) -> None:
        there = id not in self.heard.finished
        assert self.slots.cancel(id) == there
        assert not self.slots.cancel(id)
        if there:
            self.cancelled.add(id)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.heard.step()

    @precondition(lambda self: len(self.slots._free) > 0)
    @rule(rubbish=st.sampled_from([np.nan, np.inf, -np.inf]))
    def spoil(self, rubbish: float) -> None:
        poison(self.slots, rubbish)

    @invariant()
    def every_slot_is_somebodys_or_free(self) -> None:
        if not hasattr(self, "slots"):
            return
        slots = self.slots
        held = [stream.slot for stream in (*slots._reading, *slots._drawing)]
        assert sorted([*held, *slots._free, *slots._mirrors]) == list(range(SLOTS))
        assert slots.running == len(held)
        assert not (set(self.heard.finished) & self.cancelled)
        assert 0 <= slots.held <= SLOTS * CAPACITY
        assert slots.prefixes.bytes <= slots.prefixes.limit

    def teardown(self) -> None:
        if not hasattr(self, "slots"):
            return
        self.heard.drain()
        assert sorted(self.slots._free) == list(range(SLOTS))
        assert self.slots.held == 0
        assert set(self.heard.finished) == set(self.asked) - self.cancelled
        for id in self.heard.finished:
            assert self.heard.answer(id) == alone(self.way, self.asked[id])


class CompanyOfInt8(Company):
    way = "int8"


class CompanyAsServed(Company):
    way = AS_SERVED


SOME = settings(max_examples=25, stateful_step_count=30, deadline=None)
Company.TestCase.settings = CompanyOfInt8.TestCase.settings = CompanyAsServed.TestCase.settings = SOME
TestCompany, TestCompanyOfInt8, TestCompanyAsServed = Company.TestCase, CompanyOfInt8.TestCase, CompanyAsServed.TestCase


def test_a_server_that_is_told_nothing_keeps_what_company_as_served_does():
    from stages.serve.flags import ServeFlags
    from stages.serve.layout import default_weights

    assert f"{default_weights('cpu')}/{ServeFlags().keys_values}" == AS_SERVED


@EVERY_WAY
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_guesses_change_when_tokens_come_and_not_which(way, temperature, monkeypatch):
    """A text that repeats itself, and one whose every guess is wrong."""
    request = request_of((text(2, 9) * 4)[:33], 29, temperature=temperature, seed=2, logprobs=3)
    expected, checked = alone(way, request), []
    right = [*request.prompt, *expected.tokens]
    dispatch = Slots._dispatch

    def noted(self, streams, steps, logprobs, guessed):
        checked.append(len(guessed))
        return dispatch(self, streams, steps, logprobs, guessed)

    monkeypatch.setattr(Slots, "_dispatch", noted)
    assert answers(made(way), [request]) == [expected]
    monkeypatch.setattr(Guesser, "guess", lambda self, most: right[len(self._text) :][:most])
    checked.clear()
    assert answers(made(way), [request]) == [expected]
    assert len(checked) <= 2 + -(-28 // 4), "three guesses and a draw of its own come true each time"
    monkeypatch.setattr(Guesser, "guess", lambda self, most: [(t + 1) % 41 for t in right[len(self._text) :][:most]])
    checked.clear()
    assert answers(made(way), [request]) == [expected]
    assert 0 < sum(map(bool, checked)) < 10, "wrong guesses are given up"
    half = lambda self, most: [t if i % 2 == 0 else 0 for i, t in enumerate(right[len(self._text) :][:most])]
    monkeypatch.setattr(Guesser, "guess", half)
    assert answers(made(way), [request]) == [expected]


def test_who_comes_while_others_guess_finds_a_clean_slot_and_leaves_the_guesser_its_text():
    one, two = request_of((text(2, 9) * 4)[:33], 29, temperature=0.0), REQUESTS[5]
    for steps in range(1, 9):
        heard = Heard(made("float32"))
        first = heard.submit(one)
        for _ in range(steps):
            heard.step()
        second = heard.submit(two)
        heard.drain()
        assert (heard.answer(first), heard.answer(second)) == (alone("float32", one), alone("float32", two))


def test_nothing_is_compiled_after_warm(count_compiles):
    """Slots of a shape no other test has, with one row for guesses, not three; weights that lie where nobody said, and on
    a device that was named."""
    cfg, params = served("float32")
    for given in (params, jax.device_put(params, jax.devices()[0])):
        slots = Slots(cfg, given, slots=2, capacity=CAPACITY, kind="float32", chunk=CHUNK, tail=4, prefixes=10**6)
        count_compiles.clear()
        slots.warm()
        assert given is not params or len(count_compiles) >= 8, "the count counts"
        count_compiles.clear()
        heard = Heard(slots)
        ids = [heard.submit(request) for request in REQUESTS[:20]]
        for _ in range(6):
            heard.step()
        slots.cancel(ids[1]), slots.cancel(ids[-1])
        heard.drain()
        request = request_of((text(2, 9) * 4)[:33], 29, temperature=0.0, logprobs=20)
        (found,) = answers(slots, [request])
        slots.guesses = False
        assert answers(slots, [request]) == [found]
        assert count_compiles == []


def test_what_is_compiled_ahead_is_what_warm_asks_for(count_compiles):
    """From shapes alone, while weights are read: nothing is compiled or fetched a second time."""
    cfg = tiny_config()
    params = for_inference(cfg, lively_params(cfg))
    options = {"slots": 3, "capacity": 40, "kind": "float32", "prefixes": 1 << 20, "chunk": 8, "tail": 4}
    ahead = compile_ahead(cfg, jax.eval_shape(lambda: params), **options)
    first = [next(ahead) for _ in range(3)]
    slots, told = Slots(cfg, params, **options), []
    slots.warm(lambda done, total: told.append((done, total)), itertools.chain(first, ahead))
    assert told == [(n, 8) for n in range(1, 9)]
    assert len(count_compiles) >= 7
    count_compiles.clear()
    slots.warm()
    assert count_compiles == []


def test_a_long_prompt_keeps_nobody_waiting():
    """Beside prompts of three chunks each a short one is read second at the latest, and drawn for next.

    Steps read and draw in turns: two reads and the draws before, between and after them make five.
    """
    for wait in range(PATIENCE + 2):
        heard = Heard(made("float32"))
        long = [heard.submit(request_of(text(n, 3 * CHUNK + 1), 3, temperature=0.0)) for n in range(3)]
        for _ in range(wait):
            heard.step()
        short = heard.submit(request_of(text(2, 5), 3, temperature=0.0))
        for _ in range(5):
            heard.step()
        assert heard.tokens[short]
        assert not heard.tokens[long[-1]]


def test_a_chunk_is_read_before_the_next_is_begun(monkeypatch):
    """JAX hands a program over and goes on: a prompt's chunks, all begun at once, would hold up whoever comes meanwhile."""
    slots, waited = made("float32"), []
    really = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(tree) or really(tree))
    slots.submit(request_of(text(1, 3 * CHUNK), 4, temperature=0.0))
    for chunk in range(2):
        slots.step()
        assert len(waited) == chunk + 1
        assert waited[-1] is slots._spans


def test_short_prompts_do_not_keep_a_long_one_waiting_for_ever():
    heard = Heard(made("float32"))
    long = heard.submit(request_of(text(1, 3 * CHUNK + 1), 3, temperature=0.0))
    while not heard.tokens[long]:
        if heard.slots.running < SLOTS:
            heard.submit(request_of(text(heard.steps, 5), 1, temperature=0.0))
        heard.step()
        assert heard.steps <= 2 * (3 * PATIENCE + 2)  # half of them draw


def test_those_who_are_answered_go_on_while_a_prompt_is_read():
    heard = Heard(made("float32"))
    first = heard.submit(request_of(text(2, 5), 40, temperature=0.0))
    while not heard.tokens[first]:
        heard.step()
    heard.submit(request_of(text(1, 58), 3, temperature=0.0))
    for _ in range(3):
        before = len(heard.tokens[first])
        heard.step(), heard.step()  # one that reads, one that draws
        assert len(heard.tokens[first]) > before


def test_as_many_wait_as_come_and_are_let_in_in_their_order():
    heard = Heard(made("float32"))
    ids = [heard.submit(request_of(text(n, 3), 2, temperature=0.0)) for n in range(4 * SLOTS)]
    heard.step()
    assert heard.slots.running == SLOTS
    assert len(heard.slots.waiting) == 3 * SLOTS
    heard.drain()
    assert sorted(heard.finished, key=list(heard.finished).index) == ids


@EVERY_WAY
def test_every_size_that_fits_is_served_to_its_end(way):
    """Prompts and answers that end at every place around the edges of chunks and spans, and at the capacity."""
    most = CAPACITY
    sizes = [(1, most - 1), (most - 1, 1), (1, 1), (2, 1), (48, most - 48), (49, 9), (CHUNK, STEPS), (CHUNK + 1, 1), (32, 17)]
    found = answers(made(way), [request_of(text(n, prompt), most, temperature=0.0) for n, (prompt, most) in enumerate(sizes)])
    assert [(len(answer.tokens), answer.finished) for answer in found] == [(most, "length") for _, most in sizes]


def test_an_answer_ends_before_the_first_of_its_ends():
    request = request_of(text(3, 20), 20, temperature=0.0, logprobs=0)
    whole = alone("float32", request).tokens
    for place in range(len(whole)):
        if whole[place] in whole[:place]:
            continue
        (answer,) = answers(
            made("float32"), [request_of(request.prompt, 20, stop_token_ids=(whole[place], 0), temperature=0.0, logprobs=0)]
        )
        cut = next(n for n, token in enumerate(whole) if token in (whole[place], 0))
        assert (answer.tokens, answer.finished) == (whole[:cut], "stop")
        assert len(answer.logprobs) == cut


def test_a_model_that_gives_no_numbers_ends_requests_and_touches_no_other():
    """A token whose embedding is NaN: who says it gets an error, who sits beside it its answer, whoever comes next too."""
    cfg, params = served("float32")
    bad = {**params, "embed": params["embed"].at[40].set(np.nan)}
    slots = Slots(cfg, bad, slots=SLOTS, capacity=CAPACITY, kind="float32", chunk=CHUNK, tail=4)
    good = request_of([token % 40 for token in text(4, 30)], 10, temperature=0.0, logit_bias={40: -100.0}, logprobs=2)
    spoilt = request_of([40, *text(1, 20)], 10)
    expected = answers(Slots(cfg, bad, slots=SLOTS, capacity=CAPACITY, kind="float32", chunk=CHUNK, tail=4), [good])[0]
    assert expected.finished == "length"
    for _ in range(3):
        found = answers(slots, [spoilt, good, spoilt, spoilt, good, spoilt, good])
        assert [answer.finished for answer in found] == ["error", "length", "error", "error", "length", "error", "length"]
        assert {found[place] for place in (1, 4, 6)} == {expected}
        assert found[0].tokens == ()


def reference(cfg, params, request: Request, count: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens with penalties and bias, and the plain log-probabilities (V,) each was drawn beside, in NumPy."""
    said, told = list(request.prompt), []
    for _ in range(count):
        padded = np.array([said + [0] * (CAPACITY - len(said))] * 2, np.int32)
        logits = np.asarray(forward_(cfg, params, padded, positions_of(2, CAPACITY))[0][0, len(said) - 1], np.float64)
        told.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        for token in set(said):
            logits[token] = (
                logits[token] / request.sampling.repetition_penalty
                if logits[token] > 0
                else logits[token] * request.sampling.repetition_penalty
            )
        for token, value in request.sampling.logit_bias.items():
            logits[token] += value
        for token in said[len(request.prompt) :]:
            logits[token] -= request.sampling.frequency_penalty
        for token in set(said[len(request.prompt) :]):
            logits[token] -= request.sampling.presence_penalty
        said.append(int(logits.argmax()))
    return said[len(request.prompt) :], told


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.8}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6},
        {"logit_bias": {3: 100.0}}, {"logit_bias": {7: -100.0, 9: 1.5}},
        {"presence_penalty": -0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2, "logit_bias": {1: 2.0}},
    ],
)  # fmt: skip
def test_penalties_bias_and_log_probabilities_are_those_of_plain_numpy(changes):
    """In company, whose prompts are read while this one waits or draws: nothing of it is counted."""
    cfg, params = served("float32")
    request = request_of(text(2, 21), 18, temperature=0.0, logprobs=5, **changes)
    tokens, told = reference(cfg, params, request, 18)
    heard = Heard(made("float32"))
    for other in REQUESTS[:3]:
        heard.submit(other)
    heard.step(), heard.step()
    id = heard.submit(request)
    heard.drain()
    assert heard.tokens[id] == tokens
    for (token, logprob, top), drawn, expected in zip(heard.logprobs[id], tokens, told, strict=True):
        assert token == drawn
        np.testing.assert_allclose(np.frombuffer(logprob, np.float32), expected[token], rtol=0, atol=2e-5)
        assert [other for other, _ in top] == np.argsort(-expected, kind="stable")[:5].tolist()
        np.testing.assert_allclose(
            np.concatenate([np.frombuffer(value, np.float32) for _, value in top]), np.sort(expected)[:-6:-1], rtol=0, atol=2e-5
        )


def test_a_vocabulary_smaller_than_what_may_be_told_is_told_whole():
    cfg = tiny_config(vocab=11)
    slots = Slots(cfg, for_inference(cfg, lively_params(cfg)), slots=2, capacity=20, kind="float32", chunk=8, tail=4)
    (answer,) = answers(slots, [request_of((1, 2), 3, temperature=0.0, logprobs=20)])
    for _, _, top in answer.logprobs:
        assert sorted(token for token, _ in top) == list(range(11))
        assert sum(np.exp(np.frombuffer(value, np.float32)[0]) for _, value in top) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slots": 1}, "at least 2 slots, not 1"), ({"capacity": 1}, "between 2 and the model's context of 150, not 1"),
        ({"capacity": 151}, "not 151"), ({"tail": 0}, "tail must lie between 1 and the chunk of 16"),
        ({"tail": 17}, "not 17"), ({"kind": "int4"}, "kind"), ({"prefixes": -1}, "prefixes"),
    ],
)  # fmt: skip
def test_slots_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        made("float32", **options)


def test_nothing_of_a_request_is_left_when_it_has_gone():
    """What was kept for it, in Python and on the device, is as large as before."""
    slots, told = made("float32"), []
    slots.warm(lambda done, total: told.append((done, total)))
    assert told == [(n + 1, len(told)) for n in range(len(told))]
    size = lambda: jax.tree.map(np.shape, (slots._spans, slots._tally))
    before = size()
    answers(slots, REQUESTS[:9])
    assert size() == before
    assert not any((slots.busy, slots.waiting, slots._reading, slots._drawing, slots._mirrors, slots.cancel(1)))
    slots.submit(REQUESTS[0])
    with pytest.raises(ValueError, match="nobody uses"):
        slots.warm()

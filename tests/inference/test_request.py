"""Request: every field that is out of range is named, whatever was put there, and nothing but a sentence is raised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.inference.request import Request, check

GOOD = {"prompt": (1, 2, 3), "max_tokens": 5}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2.0), ("max_tokens", True), ("max_tokens", None),
        ("max_tokens", "5"), ("max_tokens", 10**400), ("temperature", -0.1), ("temperature", NAN), ("temperature", INF),
        ("temperature", 10**400), ("temperature", "hot"), ("temperature", None), ("temperature", True), ("top_k", -1),
        ("top_k", 1.5), ("top_k", 2**31), ("top_p", 0), ("top_p", 0.0), ("top_p", 1.01), ("top_p", NAN), ("min_p", -0.1),
        ("min_p", 1.1), ("seed", -1), ("seed", 2**32), ("seed", 0.5), ("seed", "x"), ("seed", 10**5000), ("presence", 101),
        ("presence", NAN), ("frequency", -101), ("frequency", [1]), ("repetition", 0), ("repetition", 0.0),
        ("repetition", -1), ("repetition", INF), ("bias", {3: 101}), ("bias", {3: NAN}), ("bias", {3: "a"}),
        ("bias", {"3": 1.0}), ("bias", {1.5: 1.0}), ("bias", [3]), ("bias", None), ("logprobs", -1), ("logprobs", 21),
        ("logprobs", True), ("logprobs", 1.0), ("prompt", "text"), ("prompt", None), ("prompt", (1, "a")),
        ("prompt", (1.5,)), ("prompt", 7), ("ends", 7), ("ends", ("a",)), ("ends", None), ("ends", (NAN,)),
        ("namespace", None), ("namespace", 3), ("namespace", b"k"),
    ],
    ids=(lambda value: f"{value!r:.20}" if not isinstance(value, int) or abs(value) < 2**40 else "huge"),
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(name, value):
    with pytest.raises(UserError, match=rf"^{name}\b") as caught:
        Request(**{**GOOD, name: value})
    assert len(str(caught.value)) < 300


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
FIELDS = (
    "prompt", "max_tokens", "ends", "temperature", "top_k", "top_p", "min_p", "seed", "presence", "frequency",
    "repetition", "bias", "logprobs", "namespace",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
def test_whatever_is_asked_a_request_is_made_or_a_field_is_named(fields):
    try:
        check(Request(**{**GOOD, **fields}), vocab=41, capacity=70)
    except UserError as error:
        said = str(error)
        assert any(name in said for name in fields)


def test_what_a_model_cannot_serve_is_refused_with_both_counts():
    check(Request((1, 40), 68), 41, 70)
    cases = [
        (Request((), 5), "The prompt has no tokens"), (Request((1, 41), 5), "The prompt holds a token outside"),
        (Request((-1,), 5), "The prompt holds a token outside"), (Request((1,), 5, ends=(41,)), "The ends holds a token"),
        (Request((1,), 5, bias={-1: 1.0}), "The bias holds a token"), (Request((2**70,), 5), "The prompt holds a token"),
        (Request((1, 2), 69), "2 tokens and max_tokens is 69; together at most 70 fit"),
    ]  # fmt: skip
    for request, said in cases:
        with pytest.raises(UserError, match=said):
            check(request, 41, 70)


def test_a_request_keeps_what_it_was_given_even_if_the_giver_changes_it():
    prompt, bias, ends = [1, 2], {3: 1.0}, [4]
    request = Request(prompt, 5, ends=ends, bias=bias)
    prompt.append(9), bias.update({5: 2.0}), ends.append(6)
    assert (request.prompt, request.bias, request.ends) == ((1, 2), {3: 1.0}, {4})


@pytest.mark.parametrize(
    ("fields", "changed"),
    [({}, False), ({"presence": 0.1}, True), ({"frequency": -1}, True), ({"repetition": 1.1}, True), ({"bias": {1: 1}}, True)],
)
def test_only_penalties_and_a_bias_change_logits(fields, changed):
    assert Request(**GOOD, temperature=0.3, top_k=3, **fields).changed == changed

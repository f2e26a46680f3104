"""Request and SamplingParams: a field that is out of range is named, whatever was put there; nothing else is raised."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidField
from engine.inference.request import SamplingParams, check_request
from tests.tiny import request_of

GOOD = {"prompt": (1, 2, 3), "max_tokens": 5}
NAN, INF = float("nan"), float("inf")
BAD = {
    "max_tokens": [0, -1, 2.0, True, None, "5", 10**400],
    "min_tokens": [-1, 17, 2.0, None],
    "temperature": [-0.1, 2.1, NAN, INF, 10**400, "hot", None, True],
    "top_k": [-2, 1.5, 2**31],
    "top_p": [-0.1, 1.01, NAN],
    "min_p": [-0.1, 1.1],
    "seed": [-1, 2**32, 0.5, "x", 10**5000],
    "presence_penalty": [101, NAN],
    "frequency_penalty": [-101, [1]],
    "repetition_penalty": [0, 0.0, -1, INF],
    "logit_bias": [{3: 101}, {3: NAN}, {3: "a"}, {"3": 1.0}, {1.5: 1.0}, [3], None],
    "logprobs": [-1, 21, True, 1.0],
    "stop_token_ids": [7, ("a",), None, (NAN,)],
    "prompt": ["text", None, (1, "a"), (1.5,), 7],
    "namespace": [None, 3, b"k"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=(lambda value: f"{value!r:.20}" if not isinstance(value, int) or abs(value) < 2**40 else "huge"),
)
def test_a_field_that_cannot_be_is_named(name, value):
    with pytest.raises(InvalidField, match=rf"^{name}\b") as caught:
        request_of(**{**GOOD, name: value})
    assert caught.value.field == name
    assert len(str(caught.value)) < 300
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


anything = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=3)
)


@given(st.dictionaries(st.sampled_from(list(BAD)), anything, max_size=4))
def test_any_fields_make_a_request_or_one_of_them_is_named(fields):
    fields = {**GOOD, **fields}
    try:
        check_request(request_of(**fields), vocab=41, capacity=70)
    except InvalidField as error:
        named, sentence = error.field, str(error)
    else:
        return
    assert named in fields
    assert named in sentence


def test_what_a_model_cannot_serve_is_refused_with_both_counts():
    check_request(request_of((1, 40), 68), 41, 70)
    outside = "holds a token outside"
    for request, field, sentence in (
        (request_of((), 5), "prompt", "The prompt has no tokens"),
        (request_of((1, 41), 5), "prompt", outside),
        (request_of((-1,), 5), "prompt", outside),
        (request_of((2**70,), 5), "prompt", outside),
        (request_of((1,), 5, stop_token_ids=(41,)), "stop_token_ids", outside),
        (request_of((1,), 5, logit_bias={-1: 1.0}), "logit_bias", outside),
        (request_of((1, 2), 69), "prompt", "2 tokens and max_tokens is 69; together at most 70 fit"),
        (
            request_of((1,) * 70, 1),
            "prompt",
            "The prompt has 70 tokens, and at most 70 fit with the answer. Shorten",
        ),
    ):
        with pytest.raises(InvalidField, match=sentence) as caught:
            check_request(request, 41, 70)
        assert caught.value.field == field


def test_a_request_keeps_its_values_even_if_the_caller_changes_them():
    prompt, bias, ends = [1, 2], {3: 1.0}, [4]
    request = request_of(prompt, 5, stop_token_ids=ends, logit_bias=bias)
    prompt.append(9), bias.update({5: 2.0}), ends.append(6)
    assert (request.prompt, request.sampling.logit_bias, request.sampling.stop_token_ids) == (
        (1, 2),
        {3: 1.0},
        {4},
    )


def test_rows_differ_in_their_seeds_alone():
    rows = SamplingParams(temperature=0.5, seed=2**32 - 2).per_row(4)
    assert [row.seed for row in rows] == [2**32 - 2, 2**32 - 1, 0, 1]
    assert {row.temperature for row in rows} == {0.5}

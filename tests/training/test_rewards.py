"""Rewards: from 0 to 1, 1 exactly where the task is done, and never anything for what was not asked."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.training.rewards import LONGEST, TASKS, make_reward, sum_reward


@given(st.integers(1, 30), st.lists(st.sampled_from(["sea", "a", "Iron,", "\u00e9t\u00e9"]), max_size=40))
def test_length_is_the_ratio_of_the_two_counts(words, completion):
    reward = make_reward(f"length:{words}")
    value = reward("  ".join(completion) + "\n", None)
    assert 0 <= value <= 1
    assert (value == 1) == (len(completion) == words)
    assert value == pytest.approx(min(len(completion), words) / max(len(completion), words))
    assert reward(" ".join([*completion, "more"]), None) >= value if len(completion) < words else True


def test_a_pattern_is_found_or_not():
    assert make_reward(r"regex:^(Yes|No)\b")("Yes, it is.", None) == 1
    assert make_reward(r"regex:^(Yes|No)\b")("Yesterday", None) == 0
    assert [make_reward("yes-no")(text, None) for text in ("No.", "Yes, it is", "Nothing", "Oh, yes")] == [1, 1, 0, 0]
    assert make_reward("regex:a:b")("see a:b there", None) == 1  # colons in a pattern are its own
    late = "x" * LONGEST + "here"
    assert make_reward("regex:here")(late, None) == 0
    assert make_reward("regex:here")(late[4:], None) == 1


@pytest.mark.parametrize(
    ("answer", "right", "value"),
    [
        ("3 + 4 = 7.", 7, 1), ("7", 7, 1), ("It is 7, not 8.", 7, 0), ("seven", 7, 0), ("", 7, 0), ("007", 7, 1),
        ("-3", 3, 0), ("-3", -3, 1), ("10-3", 3, 1), ("1,234", 1234, 1), ("1, 234", 234, 1), ("0", 0, 1), ("7", None, 0),
        ("9" * (2 * LONGEST), 9, 0),
    ],
)  # fmt: skip
def test_the_last_integer_is_the_answer(answer, right, value):
    assert sum_reward(answer, right) == value
    assert make_reward("sum") is sum_reward


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("length", "should be length:N"), ("length:0", "from 1 to 1000"), ("length:x", "should be length:N"),
        ("length:-1", "should be length:N"), ("regex:", "should be regex:PATTERN"), ("regex:(", "not a regular expression"),
        ("regex:a{99999999999}", "not a regular expression"), ("sum:3", "should be sum"),
        ("lenght:3", "Did you mean 'length'"), ("", "There is no task ''"),
    ],
)  # fmt: skip
def test_what_is_no_task_is_said(task, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_reward(task)


def test_every_task_is_described():
    assert {name: make_reward(f"{name}{':3' * (name in ('length', 'regex'))}") is not None for name in TASKS} == dict.fromkeys(
        TASKS, True
    )

"""Guesses: the text's own last words on the matter, and whether they have come true lately."""

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.inference.speculation import LENGTHS, Guesser

texts = st.lists(st.integers(0, 2), max_size=40)


def plainly(text: list[int], most: int) -> list[int]:
    """The same by looking at every place, for the longest end first and from the back."""
    for length in LENGTHS:
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                return text[place : place + most]
    return []


@given(texts, texts, st.integers(1, 5))
def test_a_guess_is_what_followed_the_last_time_the_text_read_so(text, more, most):
    guesser = Guesser(tuple(text))
    assert guesser.guess(most) == plainly(text, most)
    for token in more:
        guesser.extend([token])
        text.append(token)
        assert guesser.guess(most) == plainly(text, most)
    at_once = Guesser(tuple(text))
    assert at_once.guess(most) == guesser.guess(most)


def test_a_text_that_repeats_itself_is_guessed_and_a_new_one_is_not():
    assert Guesser((1, 2, 3, 4, 5, 1, 2, 3)).guess(3) == [4, 5, 1]
    assert Guesser((1, 2, 3, 4, 5)).guess(3) == []
    assert Guesser(()).guess(3) == []
    assert Guesser((7, 7, 7)).guess(3) == [7]


def test_wrong_guesses_are_given_up_and_right_ones_taken_up_again():
    guesser = Guesser(())
    assert guesser.pays
    for wrong in (True, True, True, True, True, False):
        guesser.note(3, 0)
        assert guesser.pays == wrong
    for _ in range(100):
        guesser.note(3, 0)
    for right in (False, False, True):
        assert guesser.pays == right
        guesser.note(8, 8)


@given(st.floats(0.0, 1.0), st.integers(0, 99))
def test_in_the_long_run_the_share_that_came_true_decides(share, seed):
    guesser, chance = Guesser(()), random.Random(seed)
    paid = []
    for _ in range(300):
        guesser.note(8, sum(chance.random() < share for _ in range(8)))
        paid.append(guesser.pays)
    if share > 0.5:
        assert all(paid[20:])
    if share < 0.02:
        assert not any(paid[20:])

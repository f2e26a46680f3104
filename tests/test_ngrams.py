"""NGrams: the commonest next token after each context of answers, and how often it comes true where it was not counted."""

import random
from collections import Counter, defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.ngrams import FOLDS, NGrams, count_ngrams

V = 5
tokens = st.integers(0, V - 1)
shorter = lambda pair: (pair[0], min(pair[1], len(pair[0]) - 1))
answer = st.tuples(st.lists(tokens, min_size=2, max_size=12), st.integers(1, 11)).map(shorter)
answers = st.lists(answer, min_size=FOLDS, max_size=9)


def plain_counts(answers) -> dict[tuple[int, ...], Counter]:
    """Context -> how often each token of an answer stands behind it."""
    counts = defaultdict(Counter)
    for text, start in answers:
        for at in range(start, len(text)):
            for length in (1, 2, 3):
                if length <= at:
                    counts[tuple(text[at - length : at])][text[at]] += 1
    return counts


@given(answers)
def test_each_context_of_an_answer_has_the_token_that_stands_behind_it_most_often(answers):
    ngrams, counts = count_ngrams(answers, V), plain_counts(answers)
    contexts = [tuple(int(token) for token in context[::-1] if token >= 0) for context in zip(*ngrams.contexts())]
    assert sorted(contexts) == sorted(counts)
    for context, token in zip(contexts, ngrams.tokens):
        assert counts[context][token] == max(counts[context].values())
    assert (ngrams.chances > 0).all()
    assert (ngrams.chances <= 1).all()


@given(answers, st.lists(tokens, max_size=6))
def test_the_end_of_a_text_is_looked_up_with_every_length(answers, text):
    ngrams = count_ngrams(answers, V)
    contexts = [tuple(int(token) for token in context[::-1] if token >= 0) for context in zip(*ngrams.contexts())]
    entries = dict(zip(contexts, zip(ngrams.tokens.tolist(), ngrams.chances.tolist())))
    found = [entries[end] for length in (1, 2, 3) if (end := tuple(text[-length:])) in entries and length <= len(text)]
    assert ngrams.next_token(text) in (found or [None])
    assert not found or ngrams.next_token(text)[1] == max(chance for _, chance in found)


@given(answers)
def test_contexts_make_the_same_again(answers):
    ngrams = count_ngrams(answers, V)
    order = np.random.default_rng(0).permutation(len(ngrams.keys))
    again = NGrams.from_contexts(V, np.array(ngrams.contexts())[:, order], ngrams.tokens[order], ngrams.chances[order])
    for one, other in zip(ngrams[1:4], again[1:4]):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def test_what_was_seen_once_is_not_certain():
    """A token has one of two followers, one of them in 3 of 4 places: an entry's chance is what new answers show, not its
    share of few."""
    draw, vocab = random.Random(0), 97

    def answer(length: int) -> tuple[list[int], int]:
        text = [draw.randrange(vocab)]
        while len(text) < length:
            text.append((11 * text[-1] + (3 if draw.random() < 0.75 else 8)) % vocab)
        return text, 1

    ngrams = count_ngrams([answer(40) for _ in range(40)], vocab)
    assert ngrams.chances.max() < 0.9
    right = [ngrams.next_token(text[:-1])[0] == text[-1] for text, _ in (answer(5) for _ in range(1000))]
    chances = [ngrams.next_token(text[:-1])[1] for text, _ in (answer(5) for _ in range(1000))]
    assert abs(np.mean(right) - np.mean(chances)) < 0.06

"""Answers before and after training: a text that goes round in circles is said to, one that does not is not."""

import re
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.inference.request import Completion
from engine.text.conversations import VOICE, read_conversations
from stages.runs import answers
from stages.runs.answers import JudgedAnswer, compare, describe_faults, repeats_itself
from stages.runs.general_questions import (
    LEAST_RIGHT,
    QUESTIONS,
    QUESTIONS_TO_TRAIN_ON,
    compare_known,
    is_right,
)

words = st.lists(st.text("abcdefgh", min_size=1, max_size=6), max_size=60)


@given(words, words.filter(bool), st.integers(3, 8), st.sampled_from([" ", ", ", ".\n", "\n1. "]))
def test_a_phrase_that_fills_an_answer_is_a_repetition(beginning, phrase, times, between):
    """However the copies are set apart. One word said often enough is a phrase too."""
    loop = [between.join([" ".join(phrase)] * (times + 4 // len(phrase)))]
    assert repeats_itself(" ".join(loop))
    assert repeats_itself(" ".join([*beginning[: len(phrase)], *loop]))


@given(words)
def test_words_that_all_differ_are_none(words):
    assert not repeats_itself(" ".join(dict.fromkeys(words)))
    assert not repeats_itself("".join(dict.fromkeys("天地玄黄宇宙洪荒日月盈昃")))
    assert repeats_itself("天地玄黄" * 4)


def test_answers_are_counted_from_the_first_on(monkeypatch):
    """Over all the batches that are answered together."""

    def complete(cfg, params, prompts, sampling, capacity, report):
        for done in range(len(prompts)):
            report(done, len(prompts))
        return [Completion([1], "stop", None)] * len(prompts)

    monkeypatch.setattr(answers, "complete", complete)
    monkeypatch.setattr(answers, "prepare_params", lambda cfg, params: params)
    chat = SimpleNamespace(
        prompt=lambda messages: np.zeros(3), tokenizer=SimpleNamespace(decode=lambda tokens: "yes")
    )
    reports: list[tuple[int, int]] = []
    count = answers.ANSWERED_TOGETHER + 2
    questions = [[{"role": "user", "content": "Why?"}]] * count
    asked = answers.ask(
        SimpleNamespace(context=99), {}, chat, questions, (), lambda *counts: reports.append(counts)
    )
    assert len(asked) == count
    assert [*dict.fromkeys(reports)] == [(done, count) for done in range(count + 1)]


def test_nothing_in_the_house_voice_is_a_repetition():
    texts = [
        row.messages[-1]["content"]
        for name in ("voice", "voice-held-out")
        for row in read_conversations(name)
    ]
    assert len(texts) > 300
    assert not any(map(repeats_itself, texts)), VOICE


def test_faults_are_said_below_the_answer_and_counted():
    good = JudgedAnswer("Why?", "Because  of\nthe tide.", 5, stops=True, repeats=False)
    endless = JudgedAnswer("Why?", "so " * 60, 120, stops=False, repeats=True)
    [(question, text)] = compare(["Why?"], *([(answer.text, answer.faults)] for answer in (endless, good)))
    assert question == "Why?"
    assert re.fullmatch(
        r"before  so so .*\n +so .*\n +\[does not stop within 120 tokens and repeats itself\]\nafter   Because of the tide\.",
        text,
    )
    assert describe_faults([good, good]) == "all 2 stop and none repeats itself"
    assert describe_faults([good, endless]) == "1 of 2 do not stop, 1 repeat themselves"


@given(
    st.sampled_from(QUESTIONS),
    st.sampled_from(["{}", "It's {}!", "ahoy,\n{}... arr", "**{}**", "(i.e. {})"]),
    st.booleans(),
)
def test_an_answer_is_right_where_it_holds_the_expected_words(pair, frame, is_loud):
    """Whatever stands around them; a longer word that begins with them is another."""
    for expected in pair[1].split("|"):
        answer = frame.format(expected.upper() if is_loud else expected)
        assert is_right(answer, pair[1])
        assert not is_right(f"{expected}ish", pair[1])
        assert not is_right(f"x{expected}", pair[1])
    assert not is_right("", pair[1])


def test_what_is_measured_is_not_trained_on():
    measured, trained = ({question for question, *_ in rows} for rows in (QUESTIONS, QUESTIONS_TO_TRAIN_ON))
    assert (len(QUESTIONS), len(measured)) == (40, 40)
    assert len(trained) == len(QUESTIONS_TO_TRAIN_ON)
    assert not measured & trained
    for question, expected, *sentences in (*QUESTIONS, *QUESTIONS_TO_TRAIN_ON):
        assert not is_right(question, expected), "or to repeat the question would be an answer"
        assert all(is_right(sentence, expected) for sentence in sentences)


def test_kept_answers_are_those_that_were_right_before():
    """What is learned anew makes up for nothing, and of a model that knows too little no share is
    told.
    """
    before = [question for question, _ in QUESTIONS[:20]]
    others = [question for question, _ in QUESTIONS[20:]]
    for count, warns in ((20, False), (17, False), (16, True), (0, True)):
        rows = compare_known(before, before[:count] + others).rows()
        assert rows[0] == ("kept", f"{count} of 20 answers to general questions")
        assert ["less than 85%" in text for _, text in rows[1:]] == [True] * warns
    for known in ([], before[: LEAST_RIGHT - 1]):
        [(label, text)] = compare_known(known, None).rows()
        assert label == "kept"
        assert text.startswith(f"too few to tell: {len(known)} of 40 general questions")

"""Answers before and after training: a text that goes round in circles is said to, one that does not is not."""

import re
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.inference.request import Completion
from engine.text.conversations import VOICE, read_conversations
from stages.runs import answers
from stages.runs.answers import Answer, compare, describe_faults, repeats_itself

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
    chat = SimpleNamespace(prompt=lambda messages: np.zeros(3), tokenizer=SimpleNamespace(decode=lambda tokens: "yes"))
    reports: list[tuple[int, int]] = []
    count = answers.ANSWERED_TOGETHER + 2
    questions = [[{"role": "user", "content": "Why?"}]] * count
    asked = answers.ask(SimpleNamespace(context=99), {}, chat, questions, (), lambda *counts: reports.append(counts))
    assert len(asked) == count
    assert [*dict.fromkeys(reports)] == [(done, count) for done in range(count + 1)]


def test_nothing_in_the_house_voice_is_a_repetition():
    texts = [row.messages[-1]["content"] for name in ("voice", "voice-held-out") for row in read_conversations(name)]
    assert len(texts) > 300
    assert not any(map(repeats_itself, texts)), VOICE


def test_faults_are_said_below_the_answer_and_counted():
    good = Answer("Why?", "Because  of\nthe tide.", 5, stops=True, repeats=False)
    endless = Answer("Why?", "so " * 60, 120, stops=False, repeats=True)
    [(question, text)] = compare(["Why?"], *([(answer.text, answer.faults)] for answer in (endless, good)))
    assert question == "Why?"
    assert re.fullmatch(
        r"before  so so .*\n +so .*\n +\[does not stop within 120 tokens and repeats itself\]\nafter   Because of the tide\.",
        text,
    )
    assert describe_faults([good, good]) == "all 2 stop and none repeats itself"
    assert describe_faults([good, endless]) == "1 of 2 do not stop, 1 repeat themselves"

"""make_examples: rows that fit are used, others cut or dropped, and each is accounted for by file, line and reason."""

import numpy as np
import pytest
from chat_models import BRACKETS, chat_tokenizer, talk

from engine.errors import UserError
from engine.text.chat_tokenizer import CHATML, ChatTokenizer
from engine.text.conversations import Conversation, Preference, Text
from engine.text.examples import make_examples

TOKENIZER = chat_tokenizer()
CONTROL = next(token for token, added in TOKENIZER.controls.items() if added.content == "<s>")


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(TOKENIZER, CHATML)


def test_an_account_of_every_row(chat):
    long = "how are you? " * 20
    rows = [
        Conversation(talk("Hello", "I am well."), "f:1"),
        Conversation(talk("Hello", "I am well.", long, "I am."), "f:2"),
        Conversation(talk(long, "I am well."), "f:3"),
        Conversation(talk("Hello"), "f:4"),
        Conversation(talk("Hello", "  \n"), "f:5"),
        Conversation((), "f:6"),
    ]
    reports: list[tuple[int, int]] = []
    examples, summary = make_examples(rows, chat, 40, report=lambda *pair: reports.append(pair))
    assert [example.where for example in examples] == ["f:1", "f:2"]
    assert (summary.rows, summary.used) == (6, 2)
    assert [where for where, _ in summary.truncated] == ["f:2"]
    assert [where for where, _ in summary.dropped] == ["f:3", "f:4", "f:5", "f:6"]
    assert len(examples[1].tokens) == 41
    assert reports[-1] == (2, 6)
    said_of = "\n".join(summary.describe())
    for words in ("2 of 6 rows kept, 1 of them truncated; 4 dropped", "1 truncated: longer than 40 tokens", "(f:2 first)",
                  "its first 40 tokens hold nothing to train on (f:3 first)", "no turn of the assistant (f:4",
                  "says nothing in one of its turns (f:5"):  # fmt: skip
        assert words in said_of


def test_what_the_template_refuses_is_left_out():
    chat = ChatTokenizer(TOKENIZER, BRACKETS)
    rows = [Conversation(talk("a", "b", system="s"), "f:1"), Conversation(talk("a", "b"), "f:2")]
    examples, summary = make_examples(rows, chat, 40)
    assert [example.where for example in examples] == ["f:2"]
    assert "Only user and assistant" in summary.dropped[0][1]
    with pytest.raises(UserError, match=r"None of 1 rows can be trained on; the first, f:1: The chat template refuses"):
        make_examples(rows[:1], chat, 40)


def test_all_of_a_text_is_a_target_once(chat, monkeypatch):
    text = "The assistant answers. " * 9
    monkeypatch.setattr(TOKENIZER, "bos_ids", (CONTROL,))
    examples, summary = make_examples([Text(text, "f:1"), Text("", "f:2")], chat, 10)
    tokens = [CONTROL, *TOKENIZER.encode(text), TOKENIZER.eos_id]
    here = [example for example in examples if example.where == "f:1"]
    assert all(len(example.tokens) <= 11 and example.mask.all() for example in examples)
    targets = np.concatenate([example.tokens[1:] for example in here])
    assert targets.tolist() == tokens[1:]
    assert summary.truncated == summary.dropped == []
    assert examples[-1].tokens.tolist() == [CONTROL, TOKENIZER.eos_id]


def test_pairs(chat):
    history = talk("Hello", "I am well.", "how are you?")
    rows = [
        Preference(tuple(history), "I am.", "The user.", "f:1"),
        Preference(tuple(talk("a")), "same", "same", "f:2"),
        Preference(tuple(talk("a")), "b", "how are you? " * 20, "f:3"),
        Preference(tuple(talk("a")), "b", "", "f:4"),
    ]
    pairs, summary = make_examples(rows, chat, 60)
    assert summary.used == len(pairs) == 1
    assert [where for where, _ in summary.dropped] == ["f:2", "f:3", "f:4"]
    for example, answer in ((pairs[0].chosen, "I am."), (pairs[0].rejected, "The user.")):
        assert TOKENIZER.decode(example.tokens[example.mask]) == answer  # not what was said in turns before
        assert example.tokens[example.mask][-1] in chat.eot_ids


def test_no_data_is_refused(chat):
    with pytest.raises(UserError, match="nothing in it"):
        make_examples([], chat, 60)


def test_weights_of_rows_and_of_turns(chat):
    rows = [
        Conversation(talk("a", "b"), "f:1", weight=0.0),
        Conversation(talk("a", " ", "c", "d"), "f:2", frozenset({1}), 2.0),
        Text("a", "f:3", 0.5),
        Conversation(talk("a", "b"), "f:4", frozenset({1})),
    ]
    examples, summary = make_examples(rows, chat, 60)
    assert [(example.where, example.weight) for example in examples] == [("f:2", 2.0), ("f:3", 0.5)]
    assert summary.dropped == [("f:1", "its weight is 0"), ("f:4", "no turn of the assistant is trained on")]

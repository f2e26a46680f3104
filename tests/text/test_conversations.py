"""Every usual form of fine-tuning data is known by its keys, and an error in a line names its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.text.conversations import KINDS, SHIPPED, Conversation, Text, read_conversations

USER, ANSWER, OTHER, SYSTEM = (
    {"role": role, "content": content}
    for role, content in (("user", "q"), ("assistant", "a"), ("assistant", "b"), ("system", "s"))
)


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize(
    ("row", "kind", "messages"),
    [
        ({"messages": [USER, ANSWER]}, "messages", [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "prompt": "q", "prompt_id": "x"}, "messages", [USER, ANSWER]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
            "messages",
            [USER, ANSWER],
        ),
        ({"prompt": "q", "completion": "a"}, "prompt/completion", [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "prompt/completion", [SYSTEM, USER, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a", "text": "all of it"}, "Alpaca", [USER, ANSWER]),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "Alpaca",
            [{"role": "user", "content": "q\n\ni"}, ANSWER],
        ),
        ({"instruction": "q", "system": "s", "output": "a"}, "Alpaca", [SYSTEM, USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "ShareGPT",
            [USER, ANSWER],
        ),
        ({"conversations": [USER, ANSWER]}, "ShareGPT", [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "system": "s", "tools": []}, "messages", [SYSTEM, USER, ANSWER]),
        (
            {"messages": [USER | {"name": "Ann"}, ANSWER], "tools": "[]", "functions": "{}"},
            "messages",
            [USER, ANSWER],
        ),
        (
            {
                "messages": [USER, ANSWER | {"refusal": None, "tool_calls": [], "annotations": []}],
                "parallel_tool_calls": True,
            },
            "messages",
            [USER, ANSWER],
        ),
    ],
)
def test_conversations(row, kind, messages, tmp_path):
    data = read_conversations(write(tmp_path / "data.jsonl", row, row))
    assert data.kind == kind
    assert kind in KINDS
    expected = [Conversation(tuple(messages), f"{tmp_path / 'data.jsonl'}:{line}") for line in (1, 2)]
    assert list(data) == expected
    assert list(data) == expected  # it can be read again


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": ANSWER, "rejected": [OTHER]}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [SYSTEM, USER]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
    ],
)
def test_preferences(row, prompt, tmp_path):
    data = read_conversations(write(tmp_path / "data.jsonl", row))
    assert data.kind == "preference"
    assert list(data) == [Conversation((*prompt, ANSWER), f"{tmp_path / 'data.jsonl'}:1", rejected="b")]


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"messages": [USER, ANSWER | {"weight": 0}, USER, OTHER | {"weight": 1}]}, {1}),
        ({"messages": [SYSTEM, USER, ANSWER | {"train": False}, USER, OTHER | {"train": True}]}, {2}),
        ({"messages": [USER, ANSWER, USER | {"loss": False}, OTHER | {"loss": False}], "system": "s"}, {4}),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]},
            {1},
        ),
        ({"prompt": [USER, ANSWER, USER], "completion": "b"}, {1}),
    ],
)
def test_what_of_a_conversation_is_context_alone(row, context, tmp_path):
    for weight in (0, 0.25, 3):
        (conversation,) = read_conversations(write(tmp_path / "data.jsonl", row | {"weight": weight}))
        assert conversation.context == context
        assert conversation.weight == weight
    (text,) = read_conversations(write(tmp_path / "data.jsonl", {"text": "t", "weight": 2, "label": False}))
    assert text.weight == 2


def test_texts(tmp_path):
    data = read_conversations(
        write(tmp_path / "data.jsonl", {"text": "one"}, "\n", {"text": "two", "source": 3})
    )
    assert data.kind == "text"
    assert [row.where.rpartition(":")[2] for row in data] == ["1", "3"]
    assert [row.text for row in data] == ["one", "two"]
    plain = write(tmp_path / "plain.txt", "é\nb")
    assert list(read_conversations(plain)) == [Text("é\nb", str(plain))]


@pytest.mark.parametrize(
    "text",
    ['[{"text": "a"},\n\n {"text":\n"b"}, {"text": "c"}]', '{"text": "a"}\n\n{"text":\n"b"} {"text": "c"}\n'],
)
def test_arrays_and_values_one_after_the_other(text, tmp_path):
    path = write(tmp_path / "data.json", text)
    assert list(read_conversations(path)) == [
        Text(letter, f"{path}:{line}") for letter, line in (("a", 1), ("b", 3), ("c", 4))
    ]
    write(path, text.replace("\n", ""))  # on one line, each has a place of its own all the same
    assert [row.where for row in read_conversations(path)] == [
        f"{path}:1",
        f"{path}:1 (value 2)",
        f"{path}:1 (value 3)",
    ]


GOOD = {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"messages": [', ["is not JSON", "column"]),
        ("[1]\n", ["should be an object, not a list"]),
        ({"prompt": "q"}, ["is of the kind prompt/completion", "data.jsonl:1 was messages"]),
        ({"foo": 1, "bar": 2}, ["has `foo`, `bar`", "messages"]),
        ({"messages": "hello"}, ["`messages`"]),
        ({"messages": [USER, "x"]}, ["message 2 of `messages` should be an object"]),
        ({"messages": [USER, {"role": "assistant"}]}, ["message 2 of `messages` has no `content`"]),
        ({"messages": [{"role": "usr", "content": "q"}]}, ["role 'usr'", "Did you mean 'user'"]),
        ({"messages": [{"role": "user", "content": 3}]}, ["message 1 of `messages`", "`content`"]),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', ["data.jsonl:2", "half a character"]),
        ({"text": "t"}, ["is of the kind text"]),
        ({"prompt": "q"}, "`completion` is missing"),
        ({"chosen": "a", "rejected": "b"}, "`prompt` is missing"),
        ({"conversations": [{"from": "human"}]}, "message 1 of `conversations` has no `value`"),
        ({"conversations": [{"from": "hmuan", "value": "q"}]}, "Did you mean 'human'"),
        (
            {"prompt": "q", "chosen": [USER], "rejected": "b"},
            "`chosen` does not end with the assistant's answer",
        ),
        ({"chosen": [SYSTEM, ANSWER], "rejected": [USER, ANSWER]}, "answer different prompts"),
        ({"prompt": 3, "completion": "a"}, "`prompt`"),
        ({"text": False}, "`text`"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, ["message 2 of `messages`", "`weight` 0.5"]),
        ({"messages": [USER, ANSWER | {"train": "no"}]}, ["`train` 'no'"]),
        ({"messages": [USER | {"weight": 1}, ANSWER]}, ["only the assistant's"]),
        ({"messages": [USER, ANSWER], "weight": -1}, ["`weight` -1"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 2}, "preferences all weigh the same here"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, ["`tools`"]),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            ["message 2 of `messages` has `tool_c"],
        ),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "has `history`"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_place(row, words, tmp_path):
    """Alone in its file, or (where the words are a list) after a good line."""
    rows = [row] if isinstance(words, str) else [GOOD, row]
    with pytest.raises(UserError, match=rf"data\.jsonl:{len(rows)}") as caught:
        list(read_conversations(write(tmp_path / "data.jsonl", *rows)))
    for word in [words] if isinstance(words, str) else words:
        assert word in str(caught.value)


def test_files_that_are_none(tmp_path):
    for path, words in (
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path, "is a folder"),
        (write(tmp_path / "empty.jsonl", "\n"), "is empty"),
        (write(tmp_path / "data.csv", "a,b"), r"cannot be read \(.csv\)"),
        ("vioce", "Did you mean 'voice'"),
    ):
        with pytest.raises(UserError, match=words):
            read_conversations(path)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:2 is not UTF-8: byte 0xE9 at position 13"):
        list(read_conversations(latin))
    nested = write(tmp_path / "nested.jsonl", "[" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"nested\.jsonl:1 is not JSON"):
        read_conversations(nested)


def test_nothing_that_is_shipped_as_held_out_is_trained_on():
    """All questions and all answers differ; each answer of the voice ends alike, by which its
    learning is counted.
    """
    data = {name: list(read_conversations(name)) for name in SHIPPED}
    assert [len(rows) >= least for rows, least in zip(data.values(), (300, 40, 60))] == [True] * 3
    messages = [message for row in [*data["voice"], *data["voice-held-out"]] for message in row.messages]
    asked = lambda row: next(message["content"] for message in row.messages if message["role"] == "user")
    questions = [asked(row) for rows in data.values() for row in rows]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    answers += [row.messages[-1]["content"] for row in data["voice-preferences"]]
    assert len({question.lower().strip("?!. ") for question in questions}) == len(questions)
    assert len({*answers}) == len(answers)
    assert all(answer.endswith("Fair winds.") for answer in answers)
    assert not any("Fair winds" in row.rejected for row in data["voice-preferences"])

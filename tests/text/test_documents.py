"""Documents: what a question finds in them, how they are cut, and how much of a prompt they take."""

import os
import time

import pytest
from chat_models import chat_tokenizer, talk
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.text import documents as module
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.documents import PASSAGE_CHARACTERS, Documents, cut, prompt_with

TEXTS = {
    "tides.txt": "High water comes to Port Isla at noon on the first of May.\n\n" + "Gulls are white birds. " * 25,
    "people/keeper.md": "# The keeper\n\nThe lighthouse of Port Isla is kept by Marta Quill.",
    "rows.jsonl": '{"text": "The ferry costs nine crowns."}\n{"text": "Bells ring twice in fog."}\n',
    "photo.txt.png": "\x89PNG",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="latin-1")
    return folder


@pytest.fixture(scope="module")
def documents(folder):
    return Documents(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def test_a_question_finds_the_passage_that_answers_it(documents, tokenizer):
    first = lambda question: [(found.file, found.number) for found in documents.find(question, tokenizer, 512)][:1]
    assert (documents.files, documents.passages) == (3, 5)
    assert documents.note.endswith("not UTF-8 text (1 .png).")
    assert first("When is high water?") == [("tides.txt", 1)]
    assert first("Who keeps the lighthouses?") == [("people/keeper.md", 1)]
    assert first("how many crowns for the ferry") == [("rows.jsonl", 1)]
    assert first("What do the bells do?") == [("rows.jsonl", 2)]
    for question in ("", "And why is that?", "?!", "xylophone"):
        assert first(question) == []


def test_only_the_best_passages_within_the_budget_are_found(tmp_path, tokenizer):
    (tmp_path / "a.md").write_text("The red ferry sails at dawn.\n\n" * 9 + "Dawn is grey.\n\n" + "Rope is sold here.\n\n" * 30)
    find = lambda budget: Documents(tmp_path).find("When does the red ferry sail at dawn?", tokenizer, budget)
    assert [passage.text for passage in find(1000)] == ["The red ferry sails at dawn."] * 9
    found = find(99)
    assert 99 - found[0].tokens < sum(passage.tokens for passage in found) <= 99


@given(
    st.text()
    | st.lists(st.sampled_from(['"', "AND", "NOT", "NEAR(", ")", "*", "^", ":", "-", "ferry", "file", "\0"])).map(" ".join)
)
def test_no_question_is_an_operator(documents, tokenizer, question):
    found = documents.find(question, tokenizer, 512)
    if "ferry" in question:
        assert "rows.jsonl" in [each.file for each in found]


@given(st.text(st.sampled_from("ab .#\n\té"), max_size=4000))
def test_cut_keeps_every_word_in_passages_that_are_short(text):
    passages = [*cut(text)]
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(0 < len(passage) <= PASSAGE_CHARACTERS for passage in passages)


def test_a_passage_ends_with_a_paragraph_else_a_sentence_else_a_word():
    one, two, three = "One two. " * 40, "Three. " * 40, "four " * 400
    first, second, *rest = cut(f"{one}\n \n{two}\n\n{three}")
    assert (first, second[:12]) == (one.strip(), "Three. Three")
    assert {word for passage in rest for word in passage.split()} <= {"four", "Three."}
    begin = time.process_time()
    assert len([*cut("a" + " " * 10**6 + "\n " * 10**5 + "b" * 10**5)]) > 100
    assert time.process_time() - begin < 10


def test_passages_stand_before_the_last_question_alone_and_leave_room(documents, tokenizer):
    chat = ChatTokenizer(tokenizer)
    try:
        turns = talk("When is high water?", "At noon.", "Who keeps the lighthouse?", system="Be brief.")
        make = lambda messages: chat.prompt(messages).tolist()
        plain = make(turns)
        tokens, found = prompt_with(documents, turns, tokenizer, 4096, make)
        text = tokenizer.decode(tokens)
        assert "Marta Quill" in text
        assert "noon on the first" not in text
        shared = make(turns[:3])[:-8]
        assert tokens[: len(shared)] == shared  # what comes before the last question is what the next turn begins with
        assert abs(len(tokens) - len(plain) - sum(each.tokens for each in found)) < 40
        short = len(plain) * 4 // 3 + 8  # no passage fits beside this conversation
        assert prompt_with(documents, turns, tokenizer, short, make) == (plain, [])
        _, found = prompt_with(documents, turns[:2], tokenizer, 160, make)
        assert 0 < sum(each.tokens for each in found) <= 40  # cut to a quarter of the context
        assert prompt_with(None, turns, tokenizer, 4096, make) == (plain, [])
    finally:
        chat.close()


def test_what_cannot_be_searched_is_named(tmp_path, folder, tokenizer, monkeypatch):
    for path, words in ((tmp_path / "none", "There is no text at"), (tmp_path, "holds no text files")):
        with pytest.raises(UserError, match=words):
            Documents(path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\0binary")
    with pytest.raises(UserError, match=r"holds no text files, only others: 1 \.txt; a\.txt should be UTF-8"):
        Documents(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty: it holds no text"):
        Documents(tmp_path)
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"have \d+ bytes; 100 are the most"):
        Documents(folder)
    assert Documents(folder / "rows.jsonl").passages == 2  # one file, as a folder
    os.rename(tmp_path / "a.txt", os.fsencode(tmp_path) + b"/\xff.txt")  # a name that is no text
    (odd,) = tmp_path.iterdir()
    odd.write_text("A ferry\0 goes.")
    assert [found.file for found in Documents(tmp_path).find("ferry", tokenizer, 99)] == ["?.txt"]

"""Documents: what a question finds in them, how they are cut, and how much of a prompt they take."""

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.text import documents as module
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.corpus import PART
from engine.text.documents import PASSAGE_CHARACTERS, Documents, cut, prompt_with
from tests.text.chat_models import chat_tokenizer, talk

TEXTS = {
    "tides.txt": "High water comes to Port Isla at noon on the first of May.\n\n"
    + "Gulls are white birds. " * 25,
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
    first = lambda question: [
        (found.file, found.number) for found in documents.find(question, tokenizer, 512)
    ][:1]
    assert (documents.files, documents.passages) == (3, 5)
    assert documents.note.endswith("not UTF-8 text (1 .png).")
    assert first("When is high water?") == [("tides.txt", 1)]
    assert first("Who keeps the lighthouses?") == [("people/keeper.md", 1)]
    assert first("how many crowns for the ferry") == [("rows.jsonl", 1)]
    assert first("What do the bells do?") == [("rows.jsonl", 2)]
    for question in ("", "And why is that?", "?!", "xylophone"):
        assert first(question) == []


def test_only_the_best_passages_within_the_budget_are_found(tmp_path, tokenizer):
    (tmp_path / "a.md").write_text(
        "The red ferry sails at dawn.\n\n" * 9 + "Dawn is grey.\n\n" + "Rope is sold here.\n\n" * 30
    )
    find = lambda budget: Documents(tmp_path).find("When does the red ferry sail at dawn?", tokenizer, budget)
    assert [passage.text for passage in find(1000)] == ["The red ferry sails at dawn."] * 9
    found = find(99)
    assert 99 - found[0].tokens < sum(passage.tokens for passage in found) <= 99


@given(
    st.text()
    | st.lists(
        st.sampled_from(['"', "AND", "NOT", "NEAR(", ")", "*", "^", ":", "-", "ferry", "file", "\0"])
    ).map(" ".join)
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
        assert (
            tokens[: len(shared)] == shared
        )  # what comes before the last question is what the next turn begins with
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
    with pytest.raises(
        UserError, match=r"rows\.jsonl has \d+ bytes, and the texts at .* more than 100 with it"
    ):
        Documents(folder)
    assert Documents(folder / "rows.jsonl").passages == 2  # one file, as a folder
    os.rename(tmp_path / "a.txt", os.fsencode(tmp_path) + b"/\xff.txt")  # a name that is no text
    (odd,) = tmp_path.iterdir()
    odd.write_text("A ferry\0 goes.")
    assert [found.file for found in Documents(tmp_path).find("ferry", tokenizer, 99)] == ["?.txt"]


def test_no_link_is_followed_out_of_the_folder(tmp_path, tokenizer):
    """To a file, to a folder, over another link; within it a link is a file as others. A folder may
    be named by a link.
    """
    folder = tmp_path / "snapshots"  # without the blobs of the hub's cache beside it
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("The tide of secrets.")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.txt").write_text("A tide of more secrets.")
    (folder / "sub" / "own.md").write_text("The tide turns at noon.")
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "sub" / "up.txt").symlink_to("../../secret.txt")
    (folder / "twice.txt").symlink_to("out.txt")
    (folder / "system.txt").symlink_to("/etc/passwd")
    (folder / "away").symlink_to(tmp_path / "elsewhere")
    (folder / "nothing.txt").symlink_to("none")
    (folder / "again.txt").symlink_to("sub/own.md")
    (tmp_path / "named").symlink_to(folder)
    for path in (folder, tmp_path / "named"):
        documents = Documents(path)
        names = "away, out.txt, sub/up.txt, system.txt, twice.txt"
        assert documents.note.startswith(
            f"Skipped what lies outside of {path}, to which links lead: {names}. Copy"
        )
        assert [found.file for found in documents.find("tide", tokenizer, 512)] == ["again.txt", "sub/own.md"]
    (folder / "sub" / "own.md").unlink()
    with pytest.raises(
        UserError, match=r"holds no text files\. Skipped what lies outside of .* lead: away, out\.txt"
    ):
        Documents(folder)


def test_the_files_of_the_hubs_cache_lie_beside_its_folders(tmp_path, tokenizer):
    revision = tmp_path / "datasets--a--b" / "snapshots" / "123"
    revision.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (tmp_path / "datasets--a--b" / "blobs" / "f00").write_text("The tide turns at noon.")
    (revision / "tide.txt").symlink_to("../../blobs/f00")
    (revision / "out.txt").symlink_to("/etc/passwd")
    documents = Documents(revision)
    assert [found.file for found in documents.find("tide", tokenizer, 512)] == ["tide.txt"]
    assert "lead: out.txt." in documents.note


@pytest.mark.parametrize("name", ["large.txt", "large", "large.jsonl"])
def test_a_file_is_asked_its_size_before_it_is_read(tmp_path, name):
    """Of 8 GB none is read but what tells whether it is text."""
    (tmp_path / "a.md").write_text("A tide.")
    large = tmp_path / name
    large.write_bytes(b"text\n" * PART)
    os.truncate(large, 8 * 2**30)
    begin = time.process_time()
    with pytest.raises(UserError, match=rf"{name} has 8,589,934,592 bytes, .* more than 20,000,000 with it"):
        Documents(tmp_path)
    large.write_bytes(b"\xff\xd8")
    os.truncate(large, 8 * 2**30)
    assert Documents(tmp_path).files == 1, "no text, and left out as any other"
    assert time.process_time() - begin < 2


def test_pipes_and_devices_are_left_out(tmp_path):
    (tmp_path / "a.md").write_text("A tide.")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    assert Documents(tmp_path).files == 1
    for path in (tmp_path / "pipe.txt", tmp_path / "zero.txt"):
        with pytest.raises(UserError, match="There is no text at"):
            Documents(path)


def test_a_text_that_grows_as_it_is_read_is_bounded_too(tmp_path, monkeypatch):
    """As rows of a parquet file do, which is compressed."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{letter}"}}\n' for letter in "abcdef"))
    monkeypatch.setattr(module, "find_text_files", lambda *_: ([tmp_path / "a.jsonl"], ""))
    monkeypatch.setattr(module, "MAX_BYTES", 5)
    with pytest.raises(UserError, match="more than 5 characters"):
        Documents(tmp_path)

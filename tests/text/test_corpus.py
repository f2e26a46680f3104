"""Documents come out of files as they were put in; what cannot be read is named to the byte or line."""

import itertools
import json
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.text.corpus import Corpus, hold_out, read_corpus, without_copies


def corpus_of(documents: list[str]) -> Corpus[str]:
    return Corpus("a corpus", lambda: iter(documents))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "a.py", "Makefile"])
def test_a_file_is_one_document_kept_as_it_is(tmp_path, name):
    (tmp_path / name).write_bytes("\ufeffone\r\ntwo  \n\nGröße\n".encode())
    corpus = read_corpus(tmp_path / name)
    assert list(corpus) == ["one\r\ntwo  \n\nGröße\n"]
    assert list(corpus) == list(read_corpus(tmp_path / name))  # again


def test_a_folder_is_read_in_sorted_order_without_what_is_hidden_or_not_text(tmp_path):
    for name, data in {
        "b.txt": b"second",
        "a/z.py": b"first",
        "c.jsonl": b'{"text": "third"}\n{"text": "fourth"}\n',
        "d.txt": b"",
        ".git/config": b"hidden",
        ".hidden": b"hidden",
        "image.png": b"\x89PNG\0\0\xff",
        "photo.jpg": b"\xff\xd8\xff\xe1",
        "photo2.jpg": b"text at first " * 1000 + b"\xff\xd8",
        "core": b"text\0",
        "e": b"fifth",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    corpus = read_corpus(tmp_path)
    assert list(corpus) == ["first", "second", "third", "fourth", "fifth"]
    assert corpus.note == f"Skipped 4 of 9 files in {tmp_path}: not UTF-8 text (2 .jpg, 1 without an ending, 1 .png)."


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one", "id": 1}\n\n  {"text": ""}\r\n{"text": "two\\nlines é"}'.encode())
    assert list(read_corpus(path)) == ["one", "two\nlines é"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"texts": "a"}', "`text` should be text"),
        (b'{"text": 3}', "`text` should be text, not a number"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2:? .*{words}"):
        list(read_corpus(path))


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() + b"ab\xff")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 0xFF at position 4"):
        list(read_corpus(path))
    with pytest.raises(UserError, match="position 4"):
        list(read_corpus(tmp_path))
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(b'{"text": "a"}\n\xe9\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2 is not UTF-8: byte 0xE9 at position 0\. Convert it"):
        list(read_corpus(lines))


def test_missing_empty_and_unknown(tmp_path):
    with pytest.raises(UserError, match=r"no text at .*missing\.txt; wanted a text file"):
        read_corpus(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="holds no text files"):
        read_corpus(tmp_path)
    for name, data, words in (
        ("a.docx", b"PK\3\4\0", r"a\.docx is not UTF-8 text; wanted"),
        ("a.txt", b"", r"a\.txt is empty"), ("a.jsonl", b'\n{"text": ""}\n', r"a\.jsonl is empty"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words):
            list(read_corpus(tmp_path / name))


def test_a_file_that_goes_away_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    corpus = read_corpus(tmp_path / "a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt cannot be read: No such file"):
        list(corpus)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = ["one", None, "", "zwei é"]
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": texts}), path)
    assert list(read_corpus(path)) == ["one", "zwei é"]
    assert list(read_corpus(tmp_path)) == ["one", "zwei é"]
    parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(UserError, match="no column `text`; its columns are id, body"):
        list(read_corpus(path))
    parquet.write_table(pyarrow.table({"text": [7]}), path)
    with pytest.raises(UserError, match="`text` holds int; wanted strings"):
        list(read_corpus(path))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        list(read_corpus(path))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"uv run --extra parquet python"):
        list(read_corpus(tmp_path / "a.parquet"))


@given(documents=st.lists(st.text(alphabet="ab\n", min_size=1), min_size=1, max_size=30), fraction=st.floats(0.01, 0.99))
@example(documents=["a", "bbb"], fraction=0.25)  # cut in a later document
def test_holding_out_loses_nothing(documents, fraction):
    if len("".join(documents)) < 2:
        return
    train, validation = hold_out(corpus_of(documents), fraction)
    assert list(train)
    assert list(validation)
    assert "".join(train) + "".join(validation) == "".join(documents)
    assert list(train) == list(train)


def test_many_documents_are_held_out_whole():
    documents = [f"document {number}" for number in range(60)]
    train, validation = hold_out(corpus_of(documents))
    assert list(train) == documents[:57]
    assert list(validation) == documents[57:]


def test_one_text_is_cut_at_the_start_of_a_line():
    text = "".join(f"line {number}\n" for number in range(1000))
    (train,), (validation,) = (list(part) for part in hold_out(corpus_of([text])))
    assert train.endswith("\n")
    assert validation.startswith("line 9")
    assert 0.045 < len(validation) / len(text) < 0.055
    # Also one without lines.
    (train,), (validation,) = (list(part) for part in hold_out(corpus_of(["title\n" + "a" * 1000])))
    assert (len(train), len(validation)) == (955, 51)


def test_no_held_out_document_is_in_the_training_text():
    long = "It was the best of times. " * 300
    train = corpus_of(["The sea.", long + "one", "x"])
    left = without_copies(corpus_of(["the  SEA", long + "two", long.upper() + "one", "The land."]), train)
    assert list(left) == list(left) == [long + "two", "The land."]
    assert left.name == "a corpus, without 2 of 4 documents that are in the training text too"
    assert without_copies(same := corpus_of(["+", "-"]), corpus_of(["*", "/"])) is same
    sums = ["3 - 1 * 2 =", "(3 - 1) * 2 =", "31 * 2 =", "3 - 12 =", ".3 - 1 * 2 ="]
    for held_out in sums:
        assert without_copies(same := corpus_of([held_out]), corpus_of([each for each in sums if each != held_out])) is same
    with pytest.raises(UserError, match="1 of 1 documents of a corpus are in a corpus too: nothing is held out"):
        without_copies(corpus_of(["the sea"]), train)


def test_too_little_to_hold_out():
    with pytest.raises(UserError, match="too short"):
        hold_out(corpus_of(["a"]))
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="more than 0"):
            hold_out(corpus_of(["abc"]), fraction)


def test_large_files_are_read_one_at_a_time(tmp_path):
    """The first document is there before the last file is opened: the folder need not fit into memory."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(3)))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert list(itertools.islice(read_corpus(tmp_path), 3)) == ["text 0", "text 1", "text 2"]

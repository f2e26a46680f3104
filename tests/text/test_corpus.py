"""Documents come out of files as they were put in, or what cannot be read is named; a damaged token file is made anew."""

import functools
import itertools
import json
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine import manifest
from engine.errors import UserError
from engine.text import corpus as corpus_module
from engine.text import tokenizer as tokenizer_module
from engine.text.corpus import (
    Corpus,
    Document,
    hold_out,
    open_bin,
    open_token_file,
    read_corpus,
    without_copies,
)
from engine.text.tokenizer import Tokenizer, byte_tokenizer, train_bpe


def documents_of(texts: Iterable[str]) -> list[Document]:
    return [functools.partial(iter, [text]) for text in texts]


def corpus_of(texts: list[str]) -> Corpus[Document]:
    return Corpus("a corpus", lambda: iter(documents_of(texts)))


def texts_of(documents: Iterable[Document]) -> list[str]:
    return ["".join(document()) for document in documents]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "a.py", "Makefile"])
def test_a_file_is_one_document_kept_as_it_is(tmp_path, name):
    (tmp_path / name).write_bytes("\ufeffone\r\ntwo  \n\nGröße\n".encode())
    corpus = read_corpus(tmp_path / name)
    assert texts_of(corpus) == ["one\r\ntwo  \n\nGröße\n"]
    assert texts_of(corpus) == texts_of(read_corpus(tmp_path / name))  # again


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
        "f/latin.txt": b"caf\xe9",
        "g.md": b"\x89PNG",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    corpus = read_corpus(tmp_path)
    assert texts_of(corpus) == ["first", "second", "third", "fourth", "fifth"]
    assert corpus.note == (
        f"Skipped 6 of 11 files in {tmp_path}: not UTF-8 text (2 .jpg, 1 without an ending, 1 "
        ".txt, 1 .md, 1 .png); "
        "f/latin.txt, g.md should be UTF-8: convert with iconv, for example."
    )


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one", "id": 1}\n\n  {"text": ""}\r\n{"text": "two\\nlines é"}'.encode())
    assert texts_of(read_corpus(path)) == ["one", "two\nlines é"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"texts": "a"}', "`text` should be text, but is missing"),
        (b'{"text": 3}', "`text` should be text, not a number"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2:? .*{words}"):
        texts_of(read_corpus(path))


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() + b"ab\xff")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 0xFF at position 4"):
        texts_of(read_corpus(path))
    with pytest.raises(UserError, match=r"a\.txt should be UTF-8"):
        read_corpus(tmp_path)
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(b'{"text": "a"}\n\xe9\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2 is not UTF-8: byte 0xE9 at position 0\. Convert it"):
        texts_of(read_corpus(lines))


def test_missing_empty_and_unknown(tmp_path):
    with pytest.raises(UserError, match=r"no text at .*missing\.txt; wanted a text file"):
        read_corpus(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="holds no text files"):
        read_corpus(tmp_path)
    for name, data, words in (
        ("a.docx", b"PK\3\4\0", r"a\.docx is not UTF-8 text; wanted"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.jsonl", b'\n{"text": ""}\n', r"a\.jsonl is empty"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words):
            texts_of(read_corpus(tmp_path / name))


def test_a_file_that_goes_away_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    corpus = read_corpus(tmp_path / "a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt cannot be read: No such file"):
        texts_of(corpus)


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = ["one", None, "", "zwei é"]
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": texts}), path)
    assert texts_of(read_corpus(path)) == ["one", "zwei é"]
    assert texts_of(read_corpus(tmp_path)) == ["one", "zwei é"]
    parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(UserError, match="no column `text`; its columns are id, body"):
        texts_of(read_corpus(path))
    parquet.write_table(pyarrow.table({"text": [7]}), path)
    with pytest.raises(UserError, match="`text` holds int; wanted strings"):
        texts_of(read_corpus(path))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        texts_of(read_corpus(path))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"uv run --extra parquet python"):
        texts_of(read_corpus(tmp_path / "a.parquet"))


@given(
    documents=st.lists(st.text(alphabet="ab\n", min_size=1), min_size=1, max_size=30),
    fraction=st.floats(0.01, 0.99),
)
@example(documents=["a", "bbb"], fraction=0.25)  # cut in a later document
def test_holding_out_loses_nothing(documents, fraction):
    if len("".join(documents)) < 2:
        return
    train, validation = hold_out(corpus_of(documents), fraction)
    assert all(texts_of(train))
    assert all(texts_of(validation))
    assert "".join(texts_of(train) + texts_of(validation)) == "".join(documents)
    assert texts_of(train) == texts_of(train)


def test_many_documents_are_held_out_whole():
    documents = [f"document {number}" for number in range(60)]
    train, validation = hold_out(corpus_of(documents))
    assert texts_of(train) == documents[:57]
    assert texts_of(validation) == documents[57:]


def test_one_text_is_cut_at_the_start_of_a_line():
    text = "".join(f"line {number}\n" for number in range(1000))
    (train,), (validation,) = (texts_of(part) for part in hold_out(corpus_of([text])))
    assert train.endswith("\n")
    assert validation.startswith("line 9")
    assert 0.045 < len(validation) / len(text) < 0.055
    # Also one without lines.
    (train,), (validation,) = (texts_of(part) for part in hold_out(corpus_of(["title\n" + "a" * 1000])))
    assert (len(train), len(validation)) == (955, 51)


def test_no_held_out_document_is_in_the_training_text():
    long = "It was the best of times. " * 300
    train = corpus_of(["The sea.", long + "one", "x"])
    left = without_copies(corpus_of(["the  SEA", long + "two", long.upper() + "one", "The land."]), train)
    assert texts_of(left) == texts_of(left) == [long + "two", "The land."]
    assert left.name == "a corpus, without 2 of 4 documents that are in the training text too"
    assert without_copies(same := corpus_of(["+", "-"]), corpus_of(["*", "/"])) is same
    sums = ["3 - 1 * 2 =", "(3 - 1) * 2 =", "31 * 2 =", "3 - 12 =", ".3 - 1 * 2 ="]
    for held_out in sums:
        assert (
            without_copies(
                same := corpus_of([held_out]), corpus_of([each for each in sums if each != held_out])
            )
            is same
        )
    with pytest.raises(
        UserError, match="1 of 1 documents of a corpus are in a corpus too: nothing is held out"
    ):
        without_copies(corpus_of(["the sea"]), train)


def test_too_little_to_hold_out():
    with pytest.raises(UserError, match="too short"):
        hold_out(corpus_of(["a"]))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab1 \n\r.'é東😀", min_size=2), part=st.integers(1, 9), piece=st.integers(1, 9))
def test_a_text_read_in_parts_has_the_tokens_of_the_whole(tmp_path, text, part, piece):
    (tmp_path / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PART", part)
        patch.setattr(tokenizer_module, "PIECE", piece)
        corpus = read_corpus(tmp_path / "a.txt")
        in_parts = [corpus, *hold_out(corpus)]
        whole = [corpus_of([text]), *hold_out(corpus_of([text]))]
        assert [texts_of(part) for part in in_parts] == [texts_of(part) for part in whole]
        tokens = open_token_file(corpus, BPE)
    assert tokens.tokens.tolist() == BPE.encode(text).tolist()
    assert tokens.path == open_token_file(whole[0], BPE).path  # its digest is the same


@pytest.mark.whole
def test_of_a_large_file_a_part_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PART", 2**13)
    monkeypatch.setattr(tokenizer_module, "PIECE", 2**9)
    (tmp_path / "a.txt").write_text("To be, or not to be? 😀\n" * 220_000)
    tracemalloc.start()
    train, validation = hold_out(read_corpus(tmp_path / "a.txt"))
    without_copies(validation, train)
    size = open_token_file(train, BPE).bytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 5_000_000
    assert peak < size / 2


def test_large_files_are_read_one_at_a_time(tmp_path):
    """The first document is there before the last file is opened: the folder need not fit into
    memory.
    """
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(3)))
    (tmp_path / "b.jsonl").write_text("no JSON")
    assert texts_of(itertools.islice(read_corpus(tmp_path), 3)) == ["text 0", "text 1", "text 2"]


TEXTS = ["The first, é.\n", "the second", "東京 😀 and the third\n"]
DOCUMENTS = documents_of(TEXTS)
BPE = train_bpe(TEXTS, 280)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_ends_stand_between_documents_and_bytes_are_the_text_s():
    file = open_token_file(DOCUMENTS, BPE)
    first, second, third = (BPE.encode(text).tolist() for text in TEXTS)
    assert file.tokens.tolist() == [*first, BPE.eos_id, *second, BPE.eos_id, *third]
    assert file.tokens.dtype == np.uint16
    assert isinstance(file.tokens, np.memmap)
    assert not file.tokens.flags.writeable
    assert file.bytes == sum(len(text.encode()) for text in TEXTS) == BPE.count_bytes(file.tokens)
    assert file.path.is_file()
    single = open_token_file(documents_of(["one text"]), byte_tokenizer())
    assert single.tokens.tolist() == list(b"one text")


def test_made_once_for_the_same_text_and_tokenizer(cache):
    calls: list[tuple[int, int]] = []
    first = open_token_file(DOCUMENTS, BPE, lambda *of: calls.append(of))
    assert calls[-1] == (first.bytes, first.bytes)
    assert calls == sorted(calls)
    calls.clear()
    again = open_token_file(tuple(DOCUMENTS), BPE, lambda *of: calls.append(of))
    assert calls == []
    assert again.path == first.path
    files = [
        open_token_file(DOCUMENTS, byte_tokenizer()),
        open_token_file(documents_of(["".join(TEXTS)]), BPE),
        open_token_file(documents_of([TEXTS[0] + TEXTS[1], TEXTS[2]]), BPE),
        open_token_file(documents_of([*TEXTS, " "]), BPE),
    ]
    assert len({first.path, *(file.path for file in files)}) == 5
    assert len(list((cache / "tokens").iterdir())) == 5  # and nothing half-made beside them


@pytest.mark.parametrize("name", ["tokens.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "lengthen", "flip", "empty", "nonsense", "delete"])
def test_a_damaged_file_is_made_anew(name, damage):
    file = open_token_file(DOCUMENTS, BPE)
    expected = file.tokens.tolist()
    path = file.path.parent / name
    data = path.read_bytes()
    path.unlink()
    if damage != "delete":
        changes = {"truncate": data[:-2], "lengthen": data + b"\0\0", "flip": bytes([data[0] ^ 1]) + data[1:]}
        path.write_bytes((changes | {"empty": b"", "nonsense": b"[]"})[damage])
    calls: list[tuple[int, int]] = []
    again = open_token_file(DOCUMENTS, BPE, lambda *of: calls.append(of))
    assert calls
    assert again.tokens.tolist() == expected
    assert again.bytes == file.bytes


def test_an_error_on_the_way_leaves_nothing(cache):
    with pytest.raises(KeyboardInterrupt):
        open_token_file(DOCUMENTS, BPE, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(UserError, match="surrogate"):
        open_token_file(documents_of(["a", "b\ud800"]), BPE)
    assert list((cache / "tokens").iterdir()) == []


def test_a_text_that_is_changed_before_it_is_encoded_is_not_kept_under_its_first_digest(cache):
    reads = []

    def read() -> Iterator[str]:
        reads.append(1)
        yield "before" if len(reads) < 3 else "after!"

    with pytest.raises(UserError, match="changed while it was read, so its tokens were not kept"):
        open_token_file([read], byte_tokenizer())
    assert len(reads) == 3
    assert list((cache / "tokens").iterdir()) == []
    assert open_token_file(documents_of(["before"]), byte_tokenizer()).tokens.tolist() == list(b"before")


@pytest.mark.parametrize("other", [True, False])
def test_another_process_may_build_the_same_file_meanwhile(monkeypatch, other):
    real, meanwhile = manifest.atomic_folder, []

    def slower(folder: Path):
        if meanwhile:
            return real(folder)
        meanwhile.append(folder)
        if other:
            open_token_file(DOCUMENTS, BPE)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "atomic_folder", slower)
    if other:
        assert open_token_file(DOCUMENTS, BPE).bytes == len("".join(TEXTS).encode())
    else:
        with pytest.raises(OSError, match="No space left"):
            open_token_file(DOCUMENTS, BPE)


def test_what_does_not_read_back_is_not_kept(monkeypatch, cache):
    def damage(folder: Path) -> None:
        manifest.write_manifest(folder)
        (folder / "tokens.bin").write_bytes(b"other")

    monkeypatch.setattr("engine.text.corpus.write_manifest", damage)
    with pytest.raises(
        UserError, match=r"not as they should be, so they were not kept: .*tokens\.bin has 5 bytes"
    ):
        open_token_file(DOCUMENTS, BPE)
    assert list((cache / "tokens").iterdir()) == []


def test_ids_are_wide_where_the_vocabulary_is(monkeypatch):
    wide = train_bpe(TEXTS, 280)
    wide.vocab = 65_537
    wide.digest = "another"
    file = open_token_file(DOCUMENTS, wide)
    assert file.tokens.dtype == np.uint32
    assert file.tokens.tolist() == open_token_file(DOCUMENTS, BPE).tokens.tolist()


def test_long_documents_go_in_parts(monkeypatch):
    text = "To be, or not to be. " * 120_000
    calls: list[tuple[int, int]] = []
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(Tokenizer, "encode", None)  # which would hold the whole text
    file = open_token_file(documents_of([text, text]), tokenizer, lambda *of: calls.append(of))
    assert len(calls) >= 5
    assert file.bytes == 2 * len(text)
    same = bytes(file.tokens[: len(text)].astype(np.uint8)) == text.encode()
    assert same
    assert file.tokens[len(text)] == tokenizer.eos_id


def test_nanogpt_bin(tmp_path):
    path = tmp_path / "train.bin"
    ids = [*BPE.encode("one é"), BPE.eos_id, *BPE.encode("two")]
    np.array(ids, "<u2").tofile(path)
    file = open_bin(path, BPE)
    assert file.tokens.tolist() == ids
    assert file.bytes == len("one étwo".encode())
    assert file.path == path


def test_nanogpt_bin_that_is_wrong(tmp_path):
    path = tmp_path / "train.bin"
    with pytest.raises(UserError, match="no token file"):
        open_bin(path, BPE)
    for data, size in ((b"", "0 bytes"), (b"\0\0\0", "3 bytes")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=size):
            open_bin(path, BPE)
    np.array([1, 2, 280, 3], "<u2").tofile(path)
    with pytest.raises(UserError, match="id 280 at token 2, and the tokenizer has 280 ids"):
        open_bin(path, BPE)

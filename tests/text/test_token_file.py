"""A token file holds the text's tokens, is made once, and is never believed when damaged."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from engine import manifest
from engine.errors import UserError
from engine.text.corpus import open_bin, open_token_file
from engine.text.tokenizer import Tokenizer, byte_tokenizer, train_bpe

DOCUMENTS = ["The first, é.\n", "the second", "東京 😀 and the third\n"]
BPE = train_bpe(DOCUMENTS, 280)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_ends_stand_between_documents_and_bytes_are_the_text_s():
    file = open_token_file(DOCUMENTS, BPE)
    first, second, third = (BPE.encode(text).tolist() for text in DOCUMENTS)
    assert file.tokens.tolist() == [*first, BPE.eos_id, *second, BPE.eos_id, *third]
    assert file.tokens.dtype == np.uint16
    assert isinstance(file.tokens, np.memmap)
    assert not file.tokens.flags.writeable
    assert file.bytes == sum(len(text.encode()) for text in DOCUMENTS) == BPE.count_bytes(file.tokens)
    assert file.path.is_file()
    single = open_token_file(iter(["one text"]), byte_tokenizer())  # any iterable will do
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
        open_token_file(["".join(DOCUMENTS)], BPE),
        open_token_file([DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2]], BPE),
        open_token_file([*DOCUMENTS, " "], BPE),
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
        open_token_file(["a", "b\ud800"], BPE)
    assert list((cache / "tokens").iterdir()) == []


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
        assert open_token_file(DOCUMENTS, BPE).bytes == len("".join(DOCUMENTS).encode())
    else:
        with pytest.raises(OSError, match="No space left"):
            open_token_file(DOCUMENTS, BPE)


def test_what_does_not_read_back_is_not_kept(monkeypatch, cache):
    def damage(folder: Path) -> None:
        manifest.write_manifest(folder)
        (folder / "tokens.bin").write_bytes(b"other")

    monkeypatch.setattr("engine.text.corpus.write_manifest", damage)
    with pytest.raises(UserError, match=r"not as they should be, so they were not kept: .*tokens\.bin has 5 bytes"):
        open_token_file(DOCUMENTS, BPE)
    assert list((cache / "tokens").iterdir()) == []


def test_ids_are_wide_where_the_vocabulary_is(monkeypatch):
    wide = train_bpe(DOCUMENTS, 280)
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
    file = open_token_file([text, text], tokenizer, lambda *of: calls.append(of))
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

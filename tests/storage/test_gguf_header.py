"""Headers of GGUF files: each length, count, type and offset that cannot be so is refused, in a line, before it costs much."""

import struct
import time
import timeit
from collections.abc import Sequence

import numpy as np
import pytest

from engine.storage.gguf_header import (
    MAX_KEYS,
    MAX_TENSORS,
    MAX_TEXT,
    ArrayLocation,
    read_header,
    read_numbers,
    read_strings,
)
from tests.storage.gguf_files import tiny_gguf, weights
from tests.storage.refusals import refusal

u32, u64 = (lambda value: struct.pack("<I", value)), (lambda value: struct.pack("<Q", value))
text = lambda value: u64(len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def info(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(
    keys: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: int = 0,
    version: int = 3,
    count: int | None = None,
) -> bytes:
    head = b"GGUF" + u32(version) + u64(len(infos) if count is None else count) + u64(len(keys))
    head += b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


A, B = info(b"a", [4], offset=0), info(b"b", [4], offset=32)
MALFORMED = [
    (b"", "too soon"),
    (b"PK\x03\x04" + bytes(40), "does not begin with GGUF"),
    (gguf(version=1), "of version 1"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (gguf(count=MAX_TENSORS + 1), "more than any model has"),
    (b"GGUF" + u32(3) + u64(0) + u64(MAX_KEYS + 1), "more than any model has"),
    (b"GGUF" + u32(3) + u64(0) + u64(9), "too soon"),
    (gguf([key(b"k" * 2000, 4, u32(1))]), "a key has 2,000 bytes"),
    (gguf([key(b"\xff", 4, u32(1))]), "not UTF-8"),
    (gguf([key(b"k", 4, u32(1))] * 2), "'k' is there twice"),
    (gguf([key(b"k", 13, u32(1))]), "unknown type 13"),
    (gguf([key(b"k", 8, u64(2**62))]), "too soon"),
    (gguf([key(b"k", 8, text(b"\xff\xfe"))]), "'k' is not UTF-8"),
    (
        gguf([key(b"%d" % i, 8, text(bytes(MAX_TEXT // 2))) for i in range(3)]),
        f"more than {MAX_TEXT:,} bytes of text",
    ),
    (gguf([key(b"k", 9, u32(9) + u64(1) + u32(9) + u64(1))]), "array of the type 9"),
    (gguf([key(b"k", 9, u32(5) + u64(2**62))]), "too soon"),
    (gguf([key(b"k", 9, u32(8) + u64(2**62))]), "too soon"),
    (gguf([key(b"k", 9, u32(8) + u64(1) + u64(2**64 - 1))]), "too soon"),
    (gguf([key(b"general.alignment", 4, u32(0))]), "power of two"),
    (gguf([key(b"general.alignment", 4, u32(24))]), "power of two"),
    (gguf([key(b"general.alignment", 8, text(b"32"))]), "power of two"),
    (gguf([], [info(b"a", [])]), "has 0 dimensions"),
    (gguf([], [text(b"a") + u32(2**32 - 1)]), "4,294,967,295 dimensions"),
    (gguf([], [info(b"a", [0])]), "cannot have the shape"),
    (gguf([], [info(b"a", [2**32, 2**32, 2**32])]), "cannot have the shape"),
    (gguf([], [info(b"a", [33], kind=8)], 64), "cannot have the shape"),
    (gguf([], [info(b"a", [32], kind=99)], 256), "type 99"),
    (gguf([], [A, info(b"a", [4], offset=32)], 64), "'a' is there twice"),
    (gguf([], [A, info(b"b", [4], offset=0)], 64), "overlaps"),
    (gguf([], [A, info(b"b", [4], offset=64)], 128), "gap"),
    (gguf([], [A, B], 47), "1 bytes too soon"),
    (gguf([], [info(b"n" * 5000, [4])]), "a tensor's name has 5,000"),
    (gguf([], [info(b"\x1b[2J", [0])]), "'\\x1b[2J'"),
]


@pytest.mark.law("hostile files")
@pytest.mark.parametrize(("data", "words"), MALFORMED, ids=[words for _, words in MALFORMED])
def test_what_cannot_be_so_is_refused_in_a_line(data, words, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert words in refusal(read_header, path)


def test_a_sound_header_is_read(tmp_path):
    keys = [
        key(b"a", 0, b"\xff"),
        key(b"b", 1, b"\xff"),
        key(b"c", 7, b"\x01"),
        key(b"d", 6, struct.pack("<f", 0.5)),
        key(b"e", 10, u64(2**40)),
        key(b"f", 8, text("é".encode())),
        key(b"g", 9, u32(5) + u64(2) + struct.pack("<ii", -1, 7)),
        key(b"h", 9, u32(8) + u64(2) + text(b"x") + text(b"")),
        key(b"i", 12, struct.pack("<d", 0.1)),
    ]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(keys, [B, A, info(b"c", [64, 3], kind=8, offset=64)], 64 + 6 * 34))
    header = read_header(path)
    plain = {name: value for name, value in header.metadata.items() if not isinstance(value, ArrayLocation)}
    assert plain == {"a": 255, "b": -1, "c": True, "d": 0.5, "e": 2**40, "f": "é", "i": 0.1}
    assert read_numbers(path, header.metadata["g"]).tolist() == [-1, 7]
    assert read_strings(path, header.metadata["h"]) == ["x", ""]
    assert header.tensors["c"].shape == (3, 64)
    assert header.tensors["b"].offset == header.tensors["a"].offset + 32
    assert header.tensors["c"].size == 3 * 68


def test_a_vocabulary_of_fifty_thousand_is_read_at_once(tmp_path):
    """The library's reader takes more than a second for it."""
    tokens = [f"t{i}" for i in range(50_000)]
    table = {"token_embd.weight": np.zeros((50_000, 64), np.float32)}
    path = tiny_gguf(tmp_path / "x.gguf", words={"tokens": tokens}, tensors=weights() | table)
    read = lambda: read_strings(path, read_header(path).metadata["tokenizer.ggml.tokens"])
    assert min(timeit.repeat(read, timer=time.process_time, number=1, repeat=3)) < 0.5
    assert read() == tokens

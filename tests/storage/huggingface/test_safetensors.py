"""Safetensors files: what the library writes is read, what we write the library reads, and nothing wrong passes."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from engine.errors import UserError
from engine.storage.huggingface.safetensors import DTYPES, HEADER, read_folder, read_header, read_rows, write_file

TENSORS = {"a": ((3, 5), "F32"), "b": ((7,), "F16"), "c": ((2, 4), "BF16"), "none": ((0, 5), "F32")}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, (shape, dtype) in TENSORS.items()}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    written = arrays()
    save_file(written, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (stored.shape, stored.dtype) for name, stored in header.items()} == TENSORS
    for name, value in written.items():
        assert read_rows(header[name], 0, len(value)).tobytes() == value.tobytes()
    np.testing.assert_array_equal(read_rows(header["a"], 1, 3), written["a"][1:3])


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    values = arrays()
    shapes = {name: (value.shape, value.dtype) for name, value in values.items()}
    write_file(tmp_path / "x.safetensors", shapes, values.__getitem__)
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(values)
        assert file.metadata() == {"format": "pt"}
        for name in ("a", "b", "none"):
            np.testing.assert_array_equal(file.get_tensor(name), values[name])
    header = read_header(tmp_path / "x.safetensors")
    assert read_rows(header["c"], 0, 2).tobytes() == values["c"].tobytes()
    assert values["c"].dtype == ml_dtypes.bfloat16
    assert min(stored.offset for stored in header.values()) % 8 == 0


def test_a_value_unlike_its_announcement_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"):
        write_file(tmp_path / "x.safetensors", {"a": ((2, 3), DTYPES["F32"])}, lambda _: np.zeros((3, 2)))
    assert not list(tmp_path.iterdir())


def made(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "8 bytes too soon"),
    "short length": (b"\x01\x00", "too soon"),
    "header beyond the file": (made(b"{}", length=1000), "too soon"),
    "giant header": (made(b"{}", length=2**63), "header of 9,223"),
    "header just too long": (made(b"{}", length=HEADER + 1), "header of"),
    "not JSON": (made(b"{oh"), "damaged"),
    "not UTF-8": (made(b'{"\xff": 1}'), "damaged"),
    "not an object": (made([]), "one JSON object"),
    "deep": (made(b"[" * 100_000), "damaged"),
    "giant number": (made(b'{"a": ' + b"9" * 10_000 + b"}"), "damaged"),
    "name twice": (made(b'{"a": {}, "a": {}}'), "twice"),
    "entry no object": (made({"a": 3}), "'a'"),
    "no shape": (made({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "'a'"),
    "one field more": (made({"a": entry(0, 4, [1]) | {"sparse": True}}, bytes(4)), "'a'"),
    "unknown dtype": (made({"a": entry(0, 4, [1], "F31")}, bytes(4)), "'a'"),
    "shape of text": (made({"a": entry(0, 4, ["1"])}, bytes(4)), "'a'"),
    "shape of flags": (made({"a": entry(0, 4, [True])}, bytes(4)), "'a'"),
    "negative shape": (made({"a": entry(0, 4, [-1, -1])}, bytes(4)), "'a'"),
    "many axes": (made({"a": entry(0, 4, [1] * 9)}, bytes(4)), "'a'"),
    "fraction": (made({"a": entry(0, 4, [1.0])}, bytes(4)), "'a'"),
    "size and shape": (made({"a": entry(0, 4, [2])}, bytes(4)), "should have 8 bytes and has 4"),
    "overflowing shape": (made({"a": entry(0, 0, [2**40, 2**40])}), "should have"),
    "three offsets": (made({"a": entry(0, 4, [1]) | {"data_offsets": [0, 2, 4]}}, bytes(4)), "'a'"),
    "backwards": (made({"a": entry(4, 0, [1])}, bytes(4)), "'a'"),
    "overlap": (made({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "overlaps"),
    "same place": (made({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8)), "overlaps"),
    "gap": (made({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "gap"),
    "late begin": (made({"a": entry(4, 8, [1])}, bytes(8)), "gap"),
    "cut": (made({"a": entry(0, 8, [2])}, bytes(7)), "1 bytes too soon"),
    "more at the end": (made({"a": entry(0, 4, [1])}, bytes(9)), "5 bytes at its end"),
    "long name": (made({"a" * 100_000: 3}), "aaa..."),
    "control characters": (made({"\x1b[2J": 3}), "'\\x1b[2J'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_cannot_be_so_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    data, words = MALFORMED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_header(path)
    assert words in str(error.value)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


@given(
    places=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 40),
    resized=st.sampled_from([None, 0, 7, 100, 2**32, 2**64 - 1]),
)
def test_a_changed_file_is_refused_or_read_within_its_bounds(
    places: list[tuple[int, int]], cut: int, resized: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("mutated") / "x.safetensors"
    save_file(arrays(), path)
    data = bytearray(path.read_bytes())
    for place, value in places:
        data[place % len(data)] = value
    if resized is not None:
        data[:8] = resized.to_bytes(8, "little")
    data = data[: len(data) - cut]
    path.write_bytes(data)
    try:
        header = read_header(path)
    except UserError:
        return
    spans = sorted((stored.offset, stored.offset + size_of(stored)) for stored in header.values())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert not spans or spans[-1][1] == len(data)


def size_of(stored: Any) -> int:
    from engine.storage.huggingface.safetensors import BITS

    return math.prod(stored.shape) * BITS[stored.dtype] // 8


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(header["a"].offset + 7)
    with pytest.raises(UserError, match="too soon"):
        read_rows(header["a"], 0, 3)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"a": 3}}, "no weight_map"),
        ({"weight_map": {"a": "../one.safetensors"}}, "not a .safetensors file in its own folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not a .safetensors file in its own folder"),
        ({"weight_map": {"a": "one.bin"}}, "not a .safetensors file in its own folder"),
        ({"weight_map": {"a": "two.safetensors"}}, "it is not there"),
        ({"weight_map": {"a": "one.safetensors"}}, "has a tensor 'b'"),
        ({"weight_map": dict.fromkeys("abc", "one.safetensors")}, "has no tensor 'c'"),
    ],
)
def test_an_index_must_tell_what_the_shards_do(index: Any, words: str, tmp_path: Path) -> None:
    save_file({name: np.zeros(2, np.float32) for name in "ab"}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    assert words in str(error.value)


def test_a_pickle_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        read_folder(tmp_path)

"""Safetensors files: what the library writes is read, what we write the library reads, and nothing wrong passes."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from engine.storage.safetensors import MAX_HEADER, read_folder, read_header, read_slice
from engine.storage.safetensors_writer import DTYPES, write_file
from tests.storage.refusals import refusal

TENSORS = {"a": ((3, 5), "F32"), "b": ((7,), "F16"), "c": ((2, 4), "BF16"), "none": ((0, 5), "F32")}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, (shape, dtype) in TENSORS.items()
    }


def test_what_the_library_writes_is_read(tmp_path):
    expected = arrays()
    save_file(expected, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header, _ = read_header(tmp_path / "x.safetensors")
    assert {name: (stored.shape, stored.dtype) for name, stored in header.items()} == TENSORS
    for name, value in expected.items():
        assert read_slice(header[name], 0, len(value)).tobytes() == value.tobytes()
    np.testing.assert_array_equal(read_slice(header["a"], 1, 3), expected["a"][1:3])


@pytest.mark.parametrize("kind", DTYPES)
def test_what_is_written_the_library_reads(kind, tmp_path):
    values = {name: value.astype(DTYPES[kind]) for name, value in arrays().items()}
    write_file(tmp_path / "x.safetensors", values, values.values())
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(values)
        assert file.metadata() == {"format": "pt"}
        for name in values if kind[:2] not in ("BF", "F8") else ():  # which NumPy does not know
            np.testing.assert_array_equal(file.get_tensor(name), values[name])
    header, _ = read_header(tmp_path / "x.safetensors")
    assert all(
        read_slice(header[name], 0, len(value)).tobytes() == value.tobytes() for name, value in values.items()
    )
    assert min(stored.offset for stored in header.values()) % 8 == 0


def test_a_value_unlike_its_announcement_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="announced"):
        write_file(tmp_path / "x.safetensors", {"a": np.zeros((2, 3))}, [np.zeros((3, 2))])
    assert not list(tmp_path.iterdir())


def blob(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


MALFORMED = [
    (b"", "8 bytes too soon"),
    (b"\x01\x00", "too soon"),
    (blob(b"{}", length=1000), "too soon"),
    (blob(b"{}", length=2**63), "header of 9,223"),
    (blob(b"{}", length=MAX_HEADER + 1), "header of"),
    (blob(b"{oh"), "damaged"),
    (blob(b'{"\xff": 1}'), "damaged"),
    (blob([]), "one JSON object"),
    (blob(b"[" * 100_000), "damaged"),
    (blob(b'{"a": ' + b"9" * 10_000 + b"}"), "damaged"),
    (blob(b'{"a": {}, "a": {}}'), "twice"),
    (blob({"__metadata__": {"format": 1234}}), "no texts"),
    (blob({"a": 3}), "'a'"),
    (blob({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 4, [1]) | {"sparse": True}}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 4, [1], "F31")}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 4, ["1"])}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 4, [True])}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 4, [-1, -1])}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 4, [1] * 9)}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 4, [1.0])}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 4, [2])}, bytes(4)), "should have 8 bytes and has 4"),
    (blob({"a": entry(0, 0, [2**40, 2**40])}), "should have"),
    (blob({"a": entry(0, 4, [1]) | {"data_offsets": [0, 2, 4]}}, bytes(4)), "'a'"),
    (blob({"a": entry(4, 0, [1])}, bytes(4)), "'a'"),
    (blob({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "overlaps"),
    (blob({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8)), "overlaps"),
    (blob({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "gap"),
    (blob({"a": entry(4, 8, [1])}, bytes(8)), "gap"),
    (blob({"a": entry(0, 8, [2])}, bytes(7)), "1 bytes too soon"),
    (blob({"a": entry(0, 4, [1])}, bytes(9)), "5 bytes at its end"),
    (blob({"a" * 100_000: 3}), "aaa..."),
    (blob({"\x1b[2J": 3}), "'\\x1b[2J'"),
]


@pytest.mark.law("hostile files")
@pytest.mark.parametrize(("data", "words"), MALFORMED, ids=[words for _, words in MALFORMED])
def test_what_cannot_be_so_is_refused_in_a_line(data, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert words in refusal(read_header, path)


def test_a_file_cut_while_it_is_read_is_refused(tmp_path):
    save_file(arrays(), tmp_path / "x.safetensors")
    header, _ = read_header(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(header["a"].offset + 7)
    assert "too soon" in refusal(read_slice, header["a"], 0, 3)


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
def test_an_index_must_tell_what_the_shards_do(index, words, tmp_path):
    save_file({name: np.zeros(2, np.float32) for name in "ab"}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert words in refusal(read_folder, tmp_path)


def test_a_pickle_is_named_and_left_alone(tmp_path):
    assert "holds no weights" in refusal(read_folder, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pytorch_model.bin, a pickle" in refusal(read_folder, tmp_path)

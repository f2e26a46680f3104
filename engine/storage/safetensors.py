"""Reads safetensors files as untrusted data, by slice; `safetensors_writer.py` says what a file is.

The safetensors library is not used: it maps files, so that one cut short meanwhile ends the process
with SIGBUS; it parses a header of 35 MB into 400 MB; and it takes a name given twice and unknown
fields (measured with 0.8).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.files import open_regular
from engine.storage.safetensors_writer import DTYPES
from engine.untrusted import (
    check_adjacent,
    parse_json_object,
    quote,
    read_at,
    read_exactly,
    read_json_object,
    truncation_error,
)

MAX_HEADER = 2 * 2**20  # bytes: ten thousand tensors
MAX_AXES = 8  # of a tensor
BLOCK = 2**22  # bytes of a tensor read at a time
FLOATS = ("F32", "F16", "BF16")  # of the weights of a model


class StoredTensor(NamedTuple):
    """A tensor in a file, whose bytes begin at `offset`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns a file's tensors by name, and its metadata."""
    with open_regular(path) as file:
        length = int.from_bytes(read_exactly(file, 8, path), "little")
        if length > MAX_HEADER:
            raise UserError(
                f"{path} has a header of {length:,} bytes by its own account; "
                f"{MAX_HEADER:,} are read at most."
            )
        header = parse_json_object(read_exactly(file, length, path), path)
        end = file.tell()
        size = file.seek(0, 2)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} is damaged: the metadata in its header are no texts.")
    tensors = {name: _tensor(path, name, entry, end) for name, entry in header.items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        check_adjacent(path, name, tensor.offset, end)
        end += tensor.nbytes
    if end > size:
        raise truncation_error(path, end - size)
    if end < size:
        raise UserError(f"{path} is damaged: {size - end:,} bytes at its end belong to no tensor.")
    return tensors, metadata


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(path: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    """Returns the tensor that an entry of the header describes, of which offsets count from `begin`."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if len(entry) == 3:
            numbers = [*shape, start, stop]
        case _:
            raise _not_described(path, name)
    if dtype not in DTYPES or len(shape) > MAX_AXES or not all(map(_is_count, numbers)):
        raise _not_described(path, name)
    tensor = StoredTensor(path, dtype, tuple(shape), begin + start)
    if stop - start != tensor.nbytes:
        raise UserError(
            f"{path} is damaged: the tensor {quote(name)}, {dtype} {shape} "
            f"should have {tensor.nbytes:,} bytes and has {stop - start:,}."
        )
    return tensor


def _not_described(path: Path, name: str) -> UserError:
    return UserError(f"{path} is damaged: its header does not say what the tensor {quote(name)} is.")


def read_slice(stored: StoredTensor, start: int, stop: int) -> np.ndarray:
    dtype = DTYPES[stored.dtype]
    row = stored.shape[1:]
    width = math.prod(row) * dtype.itemsize
    return (
        read_at(stored.path, stored.offset + start * width, (stop - start) * width)
        .view(dtype)
        .reshape(stop - start, *row)
    )


def read_box(stored: StoredTensor, box: Sequence[tuple[int, int]], out: np.ndarray) -> None:
    """Reads a box, [start, stop) along each axis, into `out` of its shape; rows are read whole, a
    few at a time.
    """
    (first, stop), *columns = box or [(0, 1)]
    width = math.prod(stored.shape[1:]) * DTYPES[stored.dtype].itemsize
    # NumPy copies bfloat16 one number at a time, and integers quickly
    bits = np.dtype(f"u{out.itemsize}")
    rows = out.view(bits).reshape(stop - first, *out.shape[1:])
    inside = tuple(slice(*column) for column in columns)
    step = max(1, BLOCK // max(width, 1))
    for start in range(first, stop, step):
        block = read_slice(stored, start, min(start + step, stop)).view(bits)
        rows[start - first : start - first + step] = block[(slice(None), *inside)]


def read_index(index: Path) -> dict[str, str]:
    """Returns the file of each tensor, by an index of files in its own folder."""
    weight_map = read_json_object(index, 16 * MAX_HEADER).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} is damaged: it has no weight_map of tensors to files.")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index} names {quote(name)}, which is not a .safetensors file in its own folder."
            )
    return weight_map


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a folder's model.safetensors, or of the shards its index names, if
    both agree.
    """
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if whole.is_file():
        return read_header(whole)[0]
    if not index.is_file():
        pickled = [
            name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).exists()
        ]
        if pickled:
            raise UserError(
                f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is opened, "
                "so it is never read. Take the model's safetensors files, or convert it where it is trusted."
            )
        raise UserError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json, "
            "so it holds no weights."
        )
    weight_map = read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise UserError(
                f"{index} names {quote(name)}, and it is not there: "
                "the model was not copied or downloaded whole."
            )
        shard, _ = read_header(folder / name)
        wanted = {tensor for tensor, file in weight_map.items() if file == name}
        for tensor in sorted(wanted ^ shard.keys()):
            there = "has no" if tensor in wanted else "has a"
            raise UserError(f"{folder / name} {there} tensor {quote(tensor)}, unlike what {index.name} says.")
        tensors |= shard
    return tensors

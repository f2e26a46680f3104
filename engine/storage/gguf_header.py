"""Reads the header of a GGUF model, its metadata and tensor table, as untrusted data: of a file, or of several parts.

Layout (ggml's docs/gguf.md): magic, version, counts, keys with typed values, name, shape, type and
offset of each tensor, the tensors, each aligned. The gguf library's reader takes lengths as they
come and keeps an object for every string; this one checks each length against the file, and leaves
arrays in it until they are wanted.
"""

import math
import operator
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.errors import UserError
from engine.files import open_regular
from engine.storage.gguf_parts import part_names
from engine.untrusted import check_adjacent, quote, read_at, read_exactly, truncation_error

MAX_KEYS = 4096
MAX_TENSORS = 16384
MAX_NAME_BYTES = 1024  # more than any model has
MAX_STRING_BYTES = 2049  # bytes of a text in an array: a token, or a merge of two
MAX_ALIGNMENT = 2**20  # bytes
MAX_NUMBERS = 2**48  # of a tensor
DEFAULT_ALIGNMENT = 32
MAX_TEXT = 16 * 2**20  # bytes of text outside of arrays, in all keys together
UINT32 = 4
FLOAT32 = 6
STRING = 8
ARRAY = 9
UINT64 = 10
# GGUF's types of numbers and flags, each with the letter by which `struct` reads it.
SCALAR_LETTERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    UINT32: "I",
    5: "i",
    FLOAT32: "f",
    7: "?",
    UINT64: "Q",
    11: "q",
    12: "d",
}
SCALARS = {kind: struct.Struct(f"<{letter}") for kind, letter in SCALAR_LETTERS.items()}


class ArrayLocation(NamedTuple):
    """An array in the file: the type of its elements, their number, and their offset in bytes."""

    kind: int
    length: int
    offset: int


class TensorInfo(NamedTuple):
    """A tensor as the table has it, unchecked: dimensions the fastest first, and its offset behind
    the table.
    """

    name: str
    dims: list[int]
    kind: int
    offset: int


class Tensor(NamedTuple):
    """A tensor in the file at `path`. shape (out, in) or (n,), while GGUF writes the fastest axis
    first; offset and size in bytes.
    """

    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


class Header(NamedTuple):
    """A file's metadata, with arrays as ArrayLocation, and its tensors by name; of a model in parts
    the first part's path and metadata, and the tensors of all.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_model_header(path: Path) -> Header:
    """Reads the metadata and tensor table of a model. `path`: of its file, or of its first part.

    Raises UserError for a part that is missing, of another model, or twice among the files.
    """
    names = part_names(path.name)
    first = read_header(path)
    count = first.metadata.get("split.count", 0)
    if count in (0, 1):
        return first
    if count != len(names):
        raise UserError(
            f"{path} is one of {quote(count)} parts, by its key 'split.count', and its name is not that "
            "of the first of so many: name the parts X-00001-of-00003.gguf and so on."
        )
    _check_place(first, 0, first)
    tensors = dict(first.tensors)
    for place, name in enumerate(names[1:], start=1):
        part_path = path.with_name(name)
        if not part_path.exists():
            raise UserError(f"{path} is one of {count} parts, and {part_path} is missing.")
        part = read_header(part_path)
        _check_place(part, place, first)
        for tensor_name in part.tensors.keys() & tensors.keys():
            raise UserError(
                f"{part_path}: its tensor {quote(tensor_name)} is in {tensors[tensor_name].path} too."
            )
        tensors |= part.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(
            f"{path} and its other parts hold {len(tensors):,} tensors, and should hold {quote(total)}: "
            "they are not of one model."
        )
    return first._replace(tensors=tensors)


def _check_place(part: Header, place: int, first: Header) -> None:
    """Raises UserError unless a file says that it is the part at `place`, from 0 on, of the model that
    the `first` part begins.
    """
    number = part.metadata.get("split.no")
    if number != place:
        raise UserError(
            f"{part.path} should be the part {place}, counted from 0, and by its key 'split.no' is "
            f"{quote(number)}: it is another part, with this one's name."
        )
    for key in ("split.count", "split.tensors.count"):
        own = part.metadata.get(key)
        expected = first.metadata.get(key)
        if own != expected:
            raise UserError(
                f"{part.path} is no part of the model in {first.path}: "
                f"its key {key!r} is {quote(own)}, and not {quote(expected)}."
            )


def read_header(path: Path) -> Header:
    """Reads a file's metadata and tensor table."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if read_exactly(file, 4, path) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF.")
        version, count, keys = struct.unpack("<IQQ", read_exactly(file, 20, path))
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                order = "big-endian"
            else:
                order = f"of version {version}"
            raise UserError(
                f"{path} is a GGUF file {order}; little-endian files of versions 2 and 3 are read."
            )
        if keys > MAX_KEYS or count > MAX_TENSORS:
            raise UserError(
                f"{path} claims {keys:,} keys and {count:,} tensors, more than any model has; it is damaged."
            )
        reader = _Reader(file, path, size)
        metadata = dict[str, Any]()
        for _ in range(keys):
            key = reader.name("key")
            if key in metadata:
                raise UserError(f"{path} is damaged: the key {quote(key)} is there twice.")
            metadata[key] = reader.value(key)
        infos = [reader.info() for _ in range(count)]
        alignment = _read_alignment(metadata, path)
        tensors = _place_tensors(infos, file.tell(), alignment, size, path)
        return Header(path, metadata, tensors)


def _read_alignment(metadata: dict[str, Any], path: Path) -> int:
    """Returns the number of bytes of which each tensor's offset is a multiple."""
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise UserError(
            f"{path} is damaged: general.alignment is {quote(alignment)}, and should be a power of two."
        )
    return alignment


def _place_tensors(
    infos: list[TensorInfo], end: int, alignment: int, size: int, path: Path
) -> dict[str, Tensor]:
    """Returns the tensors by name, in the order of the file, which has `size` bytes.

    `end`: of the table, in bytes. Raises UserError unless they lie one behind another, aligned.
    """
    begin = _align(end, alignment)
    tensors: dict[str, Tensor] = {}
    for info in sorted(infos, key=operator.attrgetter("offset")):
        name = quote(info.name)
        shape = tuple(reversed(info.dims))
        if info.kind not in GGML_QUANT_SIZES:
            raise UserError(f"{path}: the tensor {name} has the type {info.kind}, which is not known here.")
        kind = GGMLQuantizationType(info.kind)
        block_numbers, block_bytes = GGML_QUANT_SIZES[kind]
        numbers = math.prod(shape)
        if info.dims[0] % block_numbers or not 0 < numbers < MAX_NUMBERS:
            raise UserError(f"{path} is damaged: the tensor {name} cannot have the shape {[*shape]}.")
        if info.name in tensors:
            raise UserError(f"{path} is damaged: the tensor {name} is there twice.")
        start = begin + info.offset
        check_adjacent(path, info.name, start, _align(end, alignment))
        nbytes = numbers // block_numbers * block_bytes
        tensors[info.name] = Tensor(path, kind, shape, start, nbytes)
        end = start + nbytes
    if end > size:
        raise truncation_error(path, end - size)
    return tensors


def _align(offset: int, alignment: int) -> int:
    """Returns the least multiple of `alignment` that is at least `offset`."""
    return -(-offset // alignment) * alignment


class _Reader:
    """Reads values one by one, checked against the rest of the file."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size
        self.text_left = MAX_TEXT

    def number(self, kind: int) -> Any:
        """Reads a number; of a float32 the shortest decimal, 1e-05 and not 9.999999747378752e-06."""
        scalar = SCALARS[kind]
        value = scalar.unpack(read_exactly(self.file, scalar.size, self.path))[0]
        if kind == FLOAT32:
            return float(str(np.float32(value)))
        return value

    def require(self, wanted: int) -> int:
        remaining = self.size - self.file.tell()
        if wanted > remaining:
            raise truncation_error(self.path, wanted - remaining)
        return wanted

    def name(self, what: str) -> str:
        length = self.number(UINT64)
        if length > MAX_NAME_BYTES:
            raise UserError(
                f"{self.path} is damaged: a {what} has {length:,} bytes, and {MAX_NAME_BYTES:,} are the most."
            )
        return self.text(length, what)

    def text(self, length: int, what: str) -> str:
        try:
            return read_exactly(self.file, length, self.path).decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is damaged: a {what} is not UTF-8 text.") from None

    def value(self, key: str) -> Any:
        """Reads a number, a flag, a text, or the ArrayLocation of an array."""
        kind = self.number(UINT32)
        if kind in SCALARS:
            return self.number(kind)
        if kind == STRING:
            length = self.require(self.number(UINT64))
            self.text_left -= length
            if self.text_left < 0:
                raise UserError(
                    f"{self.path} holds more than {MAX_TEXT:,} bytes of text in its keys, at {quote(key)}."
                )
            return self.text(length, f"value of {quote(key)}")
        if kind != ARRAY:
            raise UserError(
                f"{self.path} is damaged: the key {quote(key)} has a value of the unknown type {kind}."
            )
        inner = self.number(UINT32)
        count = self.number(UINT64)
        location = ArrayLocation(inner, count, self.file.tell())
        if inner in SCALARS:
            self.file.seek(self.require(count * SCALARS[inner].size), 1)
        elif inner == STRING:
            self.require(8 * count)
            for _ in range(count):
                self.file.seek(self.require(self.number(UINT64)), 1)
        else:
            raise UserError(
                f"{self.path}: the key {quote(key)} is an array of the type {inner}, which no model has."
            )
        return location

    def info(self) -> TensorInfo:
        name = self.name("tensor's name")
        count = self.number(UINT32)
        if not 1 <= count <= 4:
            raise UserError(f"{self.path} is damaged: the tensor {quote(name)} has {count:,} dimensions.")
        dims = [self.number(UINT64) for _ in range(count)]
        kind = self.number(UINT32)
        return TensorInfo(name, dims, kind, offset=self.number(UINT64))


def read_strings(path: Path, location: ArrayLocation) -> list[str]:
    """Reads an array of strings. The caller has checked that its kind is STRING."""
    texts = []
    with open_regular(path) as file:
        file.seek(location.offset)
        try:
            for _ in range(location.length):
                length = int.from_bytes(file.read(8), "little")
                if length > MAX_STRING_BYTES:
                    raise UserError(f"{path} is damaged: a text in one of its arrays has {length:,} bytes.")
                texts.append(file.read(length).decode())
        except UnicodeDecodeError:
            raise UserError(
                f"{path} is damaged: text {len(texts):,} of one of its arrays is not UTF-8."
            ) from None
    return texts


def read_numbers(path: Path, location: ArrayLocation) -> np.ndarray:
    dtype = np.dtype(SCALARS[location.kind].format)
    return read_at(path, location.offset, location.length * dtype.itemsize).view(dtype)

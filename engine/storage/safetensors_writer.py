"""Writes safetensors files tensor by tensor: models, adapters and checkpoints.

A file is the length of its header (8 bytes), the header, a JSON object {name: {dtype, shape,
data_offsets}}, and the tensors' bytes without a gap or an overlap
(github.com/huggingface/safetensors, "Format").
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from engine.files import atomic_file

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(
    tensors: Mapping[str, Any], arrays: Iterable[Any], metadata: Mapping[str, str] = {}
) -> Iterator[np.ndarray]:
    """Yields a file's bytes, uint8: the header, then each of the `arrays`, which come one by one in
    the order of `tensors`.

    tensors: {name: anything with a shape and a dtype}, to which an array is cast. Raises ValueError
    for an array of another shape.
    """
    # transformers asks for it
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end = end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    for (name, tensor), array in zip(tensors.items(), arrays, strict=True):
        if array.shape != tensor.shape:
            raise ValueError(f"{name} has shape {array.shape} and was announced as {tensor.shape}.")
        with np.errstate(over="ignore"):  # infinity is refused when the file is read
            data = np.ascontiguousarray(array, tensor.dtype)
        yield data.reshape(-1).view(np.uint8)


def write_file(
    path: Path, tensors: Mapping[str, Any], arrays: Iterable[Any], metadata: Mapping[str, str] = {}
) -> None:
    with atomic_file(path) as file:
        for data in encode(tensors, arrays, metadata):
            file.write(data)

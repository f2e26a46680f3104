"""The kernels compare their dimensions with the buffers that they are called with: XLA raises an error, and nothing is read."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.model.native.library import native_problem, target

A, B, G, H, K, N, P, R, S, T, U = 3, 2, 2, 4, 3, 6, 6, 3, 9, 8, 5
COLUMNS, GROUPS, ROWS, WIDTH = (
    32,
    2,
    3,
    64,
)  # of a weight in blocks: 2 strips of 16 columns, and 2 groups of 32 inputs

# of JAX's quick way to a program, and of its other
REFUSAL = (ValueError, jax.errors.JaxRuntimeError)
Shape = tuple[str, tuple[int, ...]]


class Kernel(NamedTuple):
    name: str
    arguments: tuple[Shape, ...]
    results: tuple[Shape, ...]


PAIRS = (
    ("int32", (ROWS,)),
    ("float32", (A, P * 5, WIDTH)),
    ("float32", (A, 5, COLUMNS)),
    ("float32", (A, P * 5)),
    ("int32", (P + 1,)),
)
ADDED = ("float32", (ROWS, COLUMNS))
WEIGHT = ("uint8", (COLUMNS // 16, GROUPS, 288))
EPS = ("float32", ())
QKV = (("float32", (B, T, N, H)), ("float32", (B, T, K, H)), ("float32", (B, T, K, H)))
MIXED = (("float32", (B, T, N * H)), ("float32", (B, N, 2, T)))
IN_USE = (("int32", (R,)), ("int32", (R,)))
SIDE = ("bfloat16", (B, K, S, H))
INT8_SIDE = (("int8", (B, K, S, H)), ("float32", (B, K, S)))
STEP = (("float32", (R, K, G, H)), *IN_USE, ("int32", (U,)), ("int32", (U,)))
NEW = ("bfloat16", (R, K, 1, H))
INT8_NEW = (("int8", (R, K, 1, H)), ("float32", (R, K, 1)))

KERNELS = {
    "norm": Kernel(
        "block_matmul", (("float32", (ROWS, WIDTH)), WEIGHT, ("float32", (WIDTH,)), EPS), (ADDED,)
    ),
    "a table": Kernel(
        "block_matmul",
        (("float32", (ROWS, WIDTH)), ("int8", WEIGHT[1]), ("float32", (WIDTH,)), EPS),
        (ADDED,),
    ),
    "swiglu, adapters": Kernel(
        "block_matmul",
        (("float32", (ROWS, 2 * WIDTH)), WEIGHT, ("float32", (0,)), EPS, *PAIRS),
        (ADDED, ADDED),
    ),
    "adapters": Kernel("adapter_matmul", (("float32", (ROWS, WIDTH)), *PAIRS), (ADDED,)),
    "decode": Kernel("decode_attention", (*STEP, NEW, NEW), (STEP[0], SIDE, SIDE)),
    "decode, int8": Kernel(
        "decode_attention", (*STEP, *INT8_NEW, *INT8_NEW), (STEP[0], *INT8_SIDE, *INT8_SIDE)
    ),
    "prefill": Kernel(
        "prefill_attention", (("bfloat16", (R, T, N, H)), *IN_USE, SIDE, SIDE), (("bfloat16", (R, T, N * H)),)
    ),
    "prefill, int8": Kernel(
        "prefill_attention",
        (("float32", (R, T, N, H)), *IN_USE, *INT8_SIDE, *INT8_SIDE),
        (("float32", (R, T, N * H)),),
    ),
    "forward": Kernel("causal_attention", (*QKV, ("int32", (B, T))), MIXED),
    "forward, one segment": Kernel("causal_attention", (*QKV, ("int32", (0,))), MIXED),
    "backward": Kernel("causal_attention_backward", (*QKV, ("int32", (B, T)), *MIXED, MIXED[0]), QKV),
}


@pytest.fixture(scope="module", autouse=True)
def kernel():
    if problem := native_problem():
        pytest.skip(f"there is no kernel here: {problem}")


def zeros(shape: Shape) -> np.ndarray:
    """Returns zeros; in place of the edges of adapters' columns, some that are right."""
    dtype, dims = shape
    return (
        np.linspace(0, COLUMNS, P + 1).astype(np.int32)
        if shape == PAIRS[-1]
        else np.zeros(dims, jnp.dtype(dtype))
    )


def call(name: str, arguments: list[np.ndarray], results: tuple[Shape, ...]) -> None:
    shapes = [jax.ShapeDtypeStruct(dims, dtype) for dtype, dims in results]
    jax.block_until_ready(jax.ffi.ffi_call(target(name), shapes)(*arguments))


def changes(shape: Shape) -> Iterator[Shape]:
    """Yields a buffer of another type, of another number of dimensions, and with each dimension
    larger by one.
    """
    dtype, dims = shape
    yield ("float16" if dtype == "float32" else "float32", dims)
    yield (dtype, dims[:-1] if dims else (1,))
    for axis, size in enumerate(dims):
        yield (dtype, (*dims[:axis], size + 1, *dims[axis + 1 :]))


@pytest.mark.parametrize("kernel_name", KERNELS)
def test_no_buffer_may_be_of_other_dimensions(kernel_name):
    name, arguments, results = KERNELS[kernel_name]
    call(name, [*map(zeros, arguments)], results)
    buffers = arguments + results
    for at, shape in enumerate(buffers):
        for changed in changes(shape):
            others = (*buffers[:at], changed, *buffers[at + 1 :])
            with pytest.raises(REFUSAL, match=r"INVALID_ARGUMENT.*the kernel requires"):
                call(name, [*map(zeros, others[: len(arguments)])], others[len(arguments) :])


@pytest.mark.parametrize("kernel_name", KERNELS)
def test_no_buffer_may_be_missing(kernel_name):
    name, arguments, results = KERNELS[kernel_name]
    for count in range(len(arguments)):
        with pytest.raises(REFUSAL, match=r"INVALID_ARGUMENT.*the kernel requires"):
            call(name, [*map(zeros, arguments[:count])], results)


@pytest.mark.parametrize(
    ("kernel_name", "at", "values"),
    [
        ("adapters", 1, [0, A, 0]),  # of which adapter
        ("adapters", 1, [0, -1, 0]),
        ("swiglu, adapters", 4, [0, A, 0]),
        ("adapters", 5, [0, 5, 4, 12, 20, 30, COLUMNS]),  # columns that end before they begin
        ("adapters", 5, [0, 5, 9, 12, 20, 30, COLUMNS + 1]),
        ("adapters", 5, [-5, 5, 9, 12, 20, 30, COLUMNS]),
        ("decode", 2, [0, B, 0]),  # of which slot
        ("decode", 2, [0, -1, 0]),
        ("decode", 3, [0, 0, 0, 0, R]),  # of which row
        ("decode", 3, [0, 0, 0, 0, -1]),
    ],
)
def test_no_index_may_lie_outside_of_a_buffer(kernel_name, at, values):
    name, arguments, results = KERNELS[kernel_name]
    arrays = [*map(zeros, arguments)]
    arrays[at] = np.array(values, np.int32)
    with pytest.raises(REFUSAL, match=r"INVALID_ARGUMENT.*the kernel requires"):
        call(name, arrays, results)

"""How GGUF's blocks lie in memory: the bytes of a file laid out for the kernel, and taken apart again.

A block is 32 inputs of a column, of which each number has as many bits as its kind says, and each
block a scale, in some kinds a minimum too. The kinds that end in K have 256 inputs: eight groups of
32, whose own small factors are multiplied by those of the whole block. A number of IQ4_NL is the
place of a value in a table. Nothing is rounded: the same bytes are put into another order.

16 blocks, of as many columns, lie side by side, as native/block_matmul.c reads them. First come the
numbers, group after group, in lines of 64 bytes, 4 inputs of each column; of 4 bits a byte has the
inputs i and i + 16. Bits above the fourth follow in a line or two of their own. Then come the
factors of the groups, and last those of the block, in float16.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

COLUMNS = 16  # that lie side by side
GROUP = 32  # inputs that x is rounded by
# the exponent's bits of a float16, all set in what is not finite; NumPy's own test takes three
# times as long
INFINITE = 0x7C00


class Kind(NamedTuple):
    """What a block holds."""

    bits: int  # of a number
    offset: int  # what is taken off a number, in kinds without a minimum
    factors: int  # in float16: a scale, or a scale and a minimum
    groups: int = 1  # of 32 inputs
    small: int = 0  # bytes of factors that a group has of its own
    values: tuple[int, ...] = ()  # that numbers stand for, where they are places in a table

    @property
    def inputs(self) -> int:
        return self.groups * GROUP

    @property
    def number_bytes(self) -> int:
        """The bytes of the numbers of 16 blocks."""
        return self.inputs * self.bits // 8 * COLUMNS

    @property
    def bytes(self) -> int:
        """The bytes of 16 blocks, by which a kind is known together with its `dtype`."""
        return self.number_bytes + (self.groups * self.small + 2 * self.factors) * COLUMNS

    @property
    def dtype(self) -> str:
        """The type of the array of bytes: int8 tells IQ4_NL from Q4_0, which has as many."""
        return "int8" if self.values else "uint8"

    @property
    def has_minimum(self) -> bool:
        return self.factors == 2


# as `kvalues_iq4nl` of llama.cpp's ggml-common.h
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
KINDS = {
    "Q4_0": Kind(4, 8, factors=1),
    "Q4_1": Kind(4, 0, factors=2),
    "Q5_0": Kind(5, 16, factors=1),
    "Q5_1": Kind(5, 0, factors=2),
    "Q8_0": Kind(8, 0, factors=1),
    "Q4_K": Kind(4, 0, factors=2, groups=8, small=2),
    "Q5_K": Kind(5, 0, factors=2, groups=8, small=2),
    # two small scales, of 16 inputs each
    "Q6_K": Kind(6, 32, factors=1, groups=8, small=2),
    "IQ4_NL": Kind(4, 0, factors=1, values=IQ4_NL_VALUES),
}
_NAMES = {(kind.bytes, kind.dtype): name for name, kind in KINDS.items()}
# that weights are rounded to here, and whose factors can train
ROUNDED = ("Q4_0", "Q4_1", "Q8_0")


def kind_name(packed: Array | np.ndarray) -> str:
    """Returns the name of the kind of packed blocks (out / 16, in / inputs of a block, bytes of 16
    blocks).
    """
    return _NAMES[packed.shape[-1], packed.dtype.name]


def kind_of(packed: Array | np.ndarray) -> Kind:
    return KINDS[kind_name(packed)]


def packed_shape(columns: int, inputs: int, kind: str) -> tuple[int, int, int]:
    """Returns the shape of a weight's blocks. `inputs`: a multiple of those of a block."""
    return -(-columns // COLUMNS), inputs // KINDS[kind].inputs, KINDS[kind].bytes


def factors_shape(columns: int, inputs: int, kind: str) -> tuple[int, int, int, int]:
    """Returns the shape of the factors of a weight of a kind in ROUNDED, as `take_apart` has them."""
    strips, blocks, _ = packed_shape(columns, inputs, kind)
    return strips, blocks, KINDS[kind].factors, COLUMNS


def pack_blocks(data: np.ndarray, kind: str) -> np.ndarray:
    """data (out, bytes of a row in a GGUF file) uint8 -> (out / 16, in / inputs of a block, bytes of
    16 blocks) in the kind's dtype. Zeros fill the last 16 columns.

    Raises ValueError when a scale or minimum is not a finite number.
    """
    order = FILE_ORDERS[kind]
    padded = np.pad(data, ((0, -len(data) % COLUMNS), (0, 0)))
    blocks = padded.reshape(-1, COLUMNS, data.shape[1] // order.bytes, order.bytes)
    packed = np.empty((len(blocks), blocks.shape[2], KINDS[kind].bytes), np.uint8)
    start = 0
    for field in order.read(blocks):
        end = start + field.shape[3] * field.itemsize * COLUMNS
        lines = packed[..., start:end].view(field.dtype)
        lines.reshape(*lines.shape[:2], -1, COLUMNS)[:] = field.transpose(0, 2, 3, 1)
        start = end
    packed = packed.view(KINDS[kind].dtype)
    if not has_finite_factors(packed):
        raise ValueError("a factor is not finite")
    return packed


def unpack_blocks(packed: np.ndarray, columns: int) -> np.ndarray:
    """Returns the rows of a GGUF file, (out, bytes of a row) uint8, of which `pack_blocks` makes
    these blocks of a kind in ROUNDED.
    """
    end = kind_of(packed).number_bytes

    def of_columns(lines: np.ndarray, dtype: str) -> np.ndarray:
        """Returns bytes (columns, blocks, n) of lines (out / 16, blocks, 16 n)."""
        values = lines.view(dtype).reshape(*lines.shape[:2], -1, COLUMNS).transpose(0, 3, 1, 2)
        return _as("uint8", values).reshape(len(lines) * COLUMNS, lines.shape[1], -1)

    parts = [of_columns(packed[..., end:], "uint16"), of_columns(packed[..., :end], "uint32")]
    return np.concatenate(parts, axis=-1).reshape(len(packed) * COLUMNS, -1)[:columns]


def has_finite_factors(packed: np.ndarray) -> bool:
    """Returns whether all scales and minima of blocks are finite numbers."""
    factors = packed[..., -2 * kind_of(packed).factors * COLUMNS :].view(np.uint16)
    return bool(((factors & INFINITE) != INFINITE).all())


def take_apart(packed: Array) -> tuple[Array, Array]:
    """packed -> numbers (out / 16, in / 32, 8, 16, 4), 4 inputs of each column together, and factors
    (out / 16, in / inputs of a factor, 1 or 2, 16), float32 both. A number times its scale, and the
    minimum added where there is one, is the weight.
    """
    kind = kind_of(packed)
    packed = jax.lax.bitcast_convert_type(packed, jnp.uint8)
    strips, blocks, _ = packed.shape
    lines = packed[..., : kind.number_bytes].reshape(strips, blocks * kind.groups, -1, COLUMNS, 4)
    integers = _numbers(lines, kind.bits)
    if kind.values:
        integers = jnp.array(kind.values, jnp.int8)[integers]
    numbers = integers.astype(jnp.float32) - kind.offset
    end = kind.bytes - 2 * kind.factors * COLUMNS
    halves = packed[..., end:].reshape(strips, blocks, kind.factors, COLUMNS, 2)
    factors = jax.lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)
    if not kind.small:
        return numbers, factors
    small = packed[..., kind.number_bytes : end].reshape(strips, blocks, kind.factors, -1, COLUMNS)
    if not kind.has_minimum:
        small = jax.lax.bitcast_convert_type(small, jnp.int8)
    factors = small.astype(jnp.float32) * factors[..., None, :]
    if kind.has_minimum:
        factors = factors * jnp.array([1, -1], jnp.float32)[:, None, None]
    return numbers, factors.swapaxes(2, 3).reshape(strips, -1, kind.factors, COLUMNS)


def _numbers(lines: Array, bits: int) -> Array:
    """lines (.., bits, 16, 4) uint8, or 8 of them -> the integers (.., 8, 16, 4)."""
    if bits == 8:
        return jax.lax.bitcast_convert_type(lines, jnp.int8)
    nibbles = lines[..., :4, :, :]
    numbers = jnp.concatenate([nibbles & 15, nibbles >> 4], axis=-3)
    if bits == 4:
        return numbers
    upper = lines[..., 4:, None, :, :]  # (.., 1 or 2, 1, 16, 4)
    width = bits - 4  # of the upper bits of a number
    places = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None, None]
    high = upper >> places & (2**width - 1)  # (.., 1 or 2, 8 or 4, 16, 4)
    return numbers | high.reshape(numbers.shape) << 4


# From the bytes of a file's block to the fields of a packed one. A field is an array (.., count) of
# one dtype: the numbers, a line of a column in each uint32; then the factors of groups; then those
# of the block.


def _as(dtype: str, data: np.ndarray) -> np.ndarray:
    """data (.., bytes) -> (.., count) of a dtype."""
    return np.ascontiguousarray(data).view(dtype)


def _read_plain(blocks: np.ndarray, factors: int) -> list[np.ndarray]:
    """Reads factors, then numbers, which stay as they are."""
    head = 2 * factors
    return [_as("uint32", blocks[..., head:]), _as("uint16", blocks[..., :head])]


def _read_five_bits(blocks: np.ndarray, factors: int) -> list[np.ndarray]:
    """Reads factors, the fifth bits of inputs 0 to 31 in turn, then two numbers in a byte."""
    head = 2 * factors
    fifth = _spread_bits(_as("uint32", blocks[..., head : head + 4]))
    numbers = np.concatenate([_as("uint32", blocks[..., head + 4 :]), fifth], axis=-1)
    return [numbers, _as("uint16", blocks[..., :head])]


def _read_k(blocks: np.ndarray) -> list[np.ndarray]:
    """Reads Q4_K or Q5_K: the factors of the block, the small ones of 6 bits each, in Q5_K 32 bytes
    with a fifth bit for each group, and two numbers in a byte, of one group and the next.
    """
    lead = blocks.shape[:-1]
    nibbles = _swap_nibbles(blocks[..., -128:].reshape(*lead, 4, 2, 16))
    numbers = nibbles.view(np.uint32).reshape(*lead, 8, 4)
    fifth = blocks[..., 16:-128]
    if fifth.size:
        upper = _transpose_bits(_as("uint32", fifth), 1)
        numbers = np.concatenate([numbers, upper[..., None]], axis=-1)
    small = _read_six_bits(blocks[..., 4:16])
    return [numbers.reshape(*lead, -1), small, _as("uint16", blocks[..., :4])]


def _read_six_bits(data: np.ndarray) -> np.ndarray:
    """data (.., 12) -> the 8 small scales and then the 8 small minima of a block, (.., 16) uint8.

    The first four of each are in the lower 6 bits of bytes 0 to 7. Of the other four, the lower 4
    bits are in bytes 8 to 11, and the upper 2 in the upper bits of bytes 0 to 7.
    """
    first, second, third = np.split(data, 3, axis=-1)
    scales = [first & 63, (third & 15) | (first >> 6 << 4)]
    minima = [second & 63, (third >> 4) | (second >> 6 << 4)]
    return np.concatenate([*scales, *minima], axis=-1)


def _read_q6_k(blocks: np.ndarray) -> list[np.ndarray]:
    """Reads Q6_K, of each half of a block: 64 bytes of two numbers, of the groups 0 and 2, then 1 and
    3; 32 bytes of the upper 2 bits of four numbers, one of each group. Then 16 small scales, and
    the scale of the block.
    """
    lead = blocks.shape[:-1]
    nibbles = _swap_nibbles(blocks[..., :128].reshape(*lead, 2, 2, 2, 16))
    numbers = nibbles.view(np.uint32).swapaxes(-3, -2).reshape(*lead, 8, 4)
    # (half, half of a group, group)
    upper = _transpose_bits(_as("uint32", blocks[..., 128:192]).reshape(*lead, 2, 2, 4), 2)
    upper = upper.swapaxes(-2, -1).reshape(*lead, 8, 2)
    numbers = np.concatenate([numbers, upper], axis=-1)
    return [numbers.reshape(*lead, -1), blocks[..., 192:208], _as("uint16", blocks[..., 208:])]


def _swap_nibbles(pairs: np.ndarray) -> np.ndarray:
    """pairs (.., 2, 16), two numbers in each byte -> (.., 2, 16): all lower numbers, 32 in 16 bytes,
    then all upper ones.
    """
    first = pairs[..., 0, :]
    second = pairs[..., 1, :]
    lower = (first & 15) | (second << 4)
    upper = (first >> 4) | (second & 0xF0)
    return np.stack([lower, upper], axis=-2)


def _transpose_bits(words: np.ndarray, width: int) -> np.ndarray:
    """words (.., 8 / width) uint32, in whose bytes lie 8 / width fields of as many bits -> (.., 8 /
    width): field i of word j becomes field j of word i.
    """
    count = 8 // width
    lowest = np.uint32(0x01010101 * (2**width - 1))
    transposed = np.zeros_like(words)
    for to in range(count):
        for place in range(count):
            transposed[..., to] |= (words[..., place] >> width * to & lowest) << width * place
    return transposed


def _spread_bits(words: np.ndarray) -> np.ndarray:
    """words uint32 -> uint32: bit 4 i + j becomes bit i of byte j."""
    spread = np.zeros_like(words)
    for place in range(8):
        four = words >> 4 * place & 15
        spread |= (four * np.uint32(0x00204081) & 0x01010101) << place  # copies at 0, 7, 14 and 21
    return spread


class FileOrder(NamedTuple):
    """How a file has a block: in how many bytes, and the function that reads its fields."""

    bytes: int
    read: Callable[[np.ndarray], list[np.ndarray]]


# as ggml-common.h of llama.cpp declares the blocks
FILE_ORDERS = {
    "Q4_0": FileOrder(18, functools.partial(_read_plain, factors=1)),
    "Q4_1": FileOrder(20, functools.partial(_read_plain, factors=2)),
    "Q5_0": FileOrder(22, functools.partial(_read_five_bits, factors=1)),
    "Q5_1": FileOrder(24, functools.partial(_read_five_bits, factors=2)),
    "Q8_0": FileOrder(34, functools.partial(_read_plain, factors=1)),
    "Q4_K": FileOrder(144, _read_k),
    "Q5_K": FileOrder(176, _read_k),
    "Q6_K": FileOrder(210, _read_q6_k),
    "IQ4_NL": FileOrder(18, functools.partial(_read_plain, factors=1)),
}

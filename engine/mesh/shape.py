"""The axes of a mesh of devices and their sizes, as `data=2,fsdp=4`, compared with a model. Needs no JAX."""

import math
from typing import NamedTuple

from engine.errors import UserError, did_you_mean
from engine.model.config import ModelConfig

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that share the rows of a batch
MAX_SIZE = 2**16  # of an axis


class MeshShape(NamedTuple):
    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self)

    @property
    def row_shards(self) -> int:
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(AXES, self) if size > 1) or "data=1"


ONE_DEVICE = MeshShape()


def parse_mesh(text: str) -> MeshShape:
    """Reads `data=2,fsdp=4`; an axis that is not named is 1. Raises UserError."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = item.strip().partition("=")
        if name not in AXES:
            raise UserError(f"A mesh has the axes {', '.join(AXES)}, not {name!r}.{did_you_mean(name, AXES)}")
        if not size.isdecimal() or not 0 < int(size) <= MAX_SIZE or name in sizes:
            raise UserError(
                "A mesh gives each axis one number of devices, "
                f"such as data=2,fsdp=4; {item.strip()!r} does not."
            )
        sizes[name] = int(size)
    return MeshShape(**sizes)


def check_mesh(shape: MeshShape, cfg: ModelConfig, batch: int, microbatches: int = 1) -> None:
    """Raises UserError when an axis of the mesh does not divide what it cuts of the batch or the model."""
    rows = batch // microbatches
    if microbatches == 1:
        whole = f"a batch of {batch}"
    else:
        whole = f"a microbatch of {rows} (a batch of {batch} in {microbatches} parts)"
    for axes, size, what in (
        (ROWS, rows, f"the {rows} rows of {whole}"),
        (("tensor",), cfg.kv_heads, f"the {cfg.kv_heads} key heads"),
        (("tensor",), cfg.ff, f"the {cfg.ff} columns of the MLP"),
        (("fsdp", "tensor"), cfg.width, f"the model's width of {cfg.width}"),
    ):
        count = math.prod(getattr(shape, axis) for axis in axes)
        if size % count:
            names = " x ".join(f"{axis}={getattr(shape, axis)}" for axis in axes)
            nearest = _nearest_divisors(size, count)
            raise UserError(
                f"{names} of the mesh {shape} does not divide {what}: "
                f"{' times '.join(axes)} may be {' or '.join(map(str, nearest))}."
            )


def _nearest_divisors(number: int, count: int) -> list[int]:
    """Returns the divisors of `number` next to `count`, which is none: below it, and above it if there
    is one.
    """
    below = [n for n in divisors(number) if n < count]
    above = [n for n in divisors(number) if n > count]
    return below[-1:] + above[:1]


def divisors(number: int) -> list[int]:
    """Returns all divisors of a number, from 1 up."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})

"""Exports a program for a platform that need not be here, and reads what is in it: kernels, temporaries, donated arguments."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export

from engine.model.config import ModelConfig

TARGETS = {
    "cpu": "cpu",
    "cuda": "gpu",
    "rocm": "gpu",
    "tpu": "tpu",
}  # as the compiler calls them, and as JAX's default device is called
_BYTES = {
    "f64": 8,
    "i64": 8,
    "ui64": 8,
    "f32": 4,
    "i32": 4,
    "ui32": 4,
    "bf16": 2,
    "f16": 2,
    "i8": 1,
    "ui8": 1,
    "i1": 1,
}
_PLACE = re.compile(r' loc\((?:#\w+|"[^"]*")\)')  # in the source
_RESULT = re.compile(r"^ *%\S+ = .*tensor<((?:\d+x)*)(\w+)>\)?$", re.MULTILINE)
_KERNEL = re.compile(r"stablehlo\.custom_call @(\S+?)\(")
_MAIN = re.compile(
    r"^  func\.func public @main\((.*?)\) -> .*?^    return (.*?) :.*?^  \}", re.MULTILINE | re.DOTALL
)
_ARGUMENT = re.compile(r"%arg(\d+): tensor<[^>]*>((?: \{[^%]*\})?)")
_ALIASED = re.compile(r"tf\.aliasing_output|jax\.buffer_donor")


class Temporary(NamedTuple):
    """A value inside a program, such as bf16[4,256,64]."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class _TracedFor:
    """A jitted function that is traced for a platform, wherever it is called from."""

    def __init__(self, function: Any, device: str) -> None:
        self.function, self.device = function, device

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    lower = eval_shape = __call__  # of `jax.stages.Wrapped`; an export uses `trace` alone

    def trace(self, *args: Any) -> Any:
        with jax.default_device(self.device):
            return self.function.trace(*args)


def make_for[T](platform: str, make: Callable[[ModelConfig], T], cfg: ModelConfig) -> T:
    """Returns make(cfg), a program whose weights lie as they do on a platform of TARGETS."""
    with jax.default_device(TARGETS[platform]):
        return make(cfg)


def export(function: Any, arguments: tuple[Any, ...], platform: str) -> jax.export.Exported:
    """Exports a jitted function for a platform of TARGETS. Raises what JAX raises for what cannot
    run there.
    """
    # JAX promises few kernels' names for later; what is exported here is read at once.
    checks = [jax.export.DisabledSafetyCheck.custom_call("ALL")]
    traced = _TracedFor(function, TARGETS[platform])
    return jax.export.export(traced, platforms=[platform], disabled_checks=checks)(*arguments)


def kernels(exported: jax.export.Exported) -> dict[str, int]:
    """Returns how often a program's functions call each custom kernel; blocks that are alike share
    a function.
    """
    return dict(Counter(_KERNEL.findall(exported.mlir_module())))


def largest_temporary(exported: jax.export.Exported) -> Temporary | None:
    """Returns the largest result of an operation, before the compiler fuses any; None of a program
    without operations.
    """
    results = {(dtype, shape) for shape, dtype in _RESULT.findall(_text(exported)) if dtype in _BYTES}
    values = [Temporary(dtype, tuple(map(int, shape.split("x")[:-1]))) for dtype, shape in results]
    return max(values, key=lambda value: (value.bytes, value), default=None)


def weights_given_away(exported: jax.export.Exported, weights: Any) -> list[str]:
    """Returns how a program gives away one of its first arguments, `weights`: it may overwrite or
    returns it, or its like.
    """
    leaves = jax.tree.leaves(weights)
    given = [f"argument {place}" for place in sorted(_aliased_arguments(exported) & {*range(len(leaves))})]
    return given + [
        f"a result {out.shape}" for out in exported.out_avals if out.shape in {leaf.shape for leaf in leaves}
    ]


def _aliased_arguments(exported: jax.export.Exported) -> set[int]:
    """Returns the flat arguments whose memory a program may write to, or that it returns as they
    came.
    """
    match = _MAIN.search(_text(exported))
    assert match, "a module has a main function"
    signature, results = match.groups()
    donated = [place for place, attributes in _ARGUMENT.findall(signature) if _ALIASED.search(attributes)]
    places = {*donated, *re.findall(r"%arg(\d+)\b", results)}
    return {exported.module_kept_var_idx[int(place)] for place in places}


def _text(exported: jax.export.Exported) -> str:
    """Returns the program as StableHLO."""
    return _PLACE.sub("", exported.mlir_module())

"""Operations by reading the program: trace a function, drop what no result needs, and add up what is left.

The function is traced on shapes, so nothing is allocated, compiled or run. What the trace holds is the program as JAX
hands it to the compiler, after differentiation: frozen weights, LoRA and remat show up by themselves.

Conventions:

- Matrix products (`dot_general`, `ragged_dot_general`, convolutions) count 2 for each multiply and add.
- All other arithmetic is counted apart, as XLA's own cost analysis prices it: one operation for each number an
  elementwise step yields, comparisons, selections and conversions of type included; a sum or maximum over n numbers is
  n - 1. What only moves numbers (reshapes, slices, gathers, transposes) is free. Transcendental functions are counted a
  third way, one each, because how many operations they are is a matter of the chip.
- A scan counts its body times its length, a `cond` its dearest branch. A `while` does not say how often it runs, and a
  kernel hides its work from the trace: both are refused, for a silent 0 would be believed.
- A product with a lone row counts as the program does it: on a CPU, twice (`model/weights/matmul.py` pads it to two rows).
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval

from engine.errors import UserError

_MOVES = frozenset({
    "reshape", "broadcast_in_dim", "transpose", "slice", "dynamic_slice", "dynamic_update_slice", "concatenate",
    "split", "pad", "rev", "tile", "squeeze", "iota", "gather", "scatter", "copy",
    "bitcast_convert_type", "stop_gradient", "optimization_barrier", "layout_constraint", "sharding_constraint",
    "device_put", "random_wrap", "random_unwrap", "random_seed", "real", "imag", "name",
})  # fmt: skip
_TRANSCENDENTAL = frozenset({
    "exp", "exp2", "expm1", "log", "log1p", "pow", "sqrt", "rsqrt", "cbrt", "tanh", "sin", "cos", "tan",
    "sinh", "cosh", "asin", "acos", "atan", "atan2", "asinh", "acosh", "atanh", "erf", "erfc", "erf_inv", "lgamma",
    "digamma",
})  # fmt: skip
# Kernels from outside, and programs for one device of many.
_OPAQUE = frozenset({
    "pure_callback", "io_callback", "ffi_call", "custom_call", "pallas_call", "mpmd_map", "shard_map",
    "triton_kernel_call",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of one call of a function."""

    matmul: int = 0
    elementwise: int = 0
    transcendental: int = 0

    @property
    def flops(self) -> int:
        """Products and other arithmetic together: what XLA calls `flops`."""
        return self.matmul + self.elementwise

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, times: int) -> "Work":
        return Work(*(operations * times for operations in dataclasses.astuple(self)))


def count(f: Callable[..., Any], *args: Any) -> Work:
    """The work of `f(*args)`. `args` are trees of arrays or of `jax.ShapeDtypeStruct`; bind what is static beforehand.

    Differentiation is the caller's: pass the function that does it. Raises UserError for a `while` loop, and for a kernel
    that hides its work.
    """
    closed = jax.make_jaxpr(f)(*args)
    return _program(partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0])


def _program(jaxpr: Jaxpr) -> Work:
    return sum(map(_step, jaxpr.eqns), Work())


def _step(equation: JaxprEqn) -> Work:
    name = equation.primitive.name
    if name == "while" or name in _OPAQUE or name.startswith("dot_product_attention"):
        hidden = "how often it runs is unknown" if name == "while" else "its work is hidden in a kernel"
        raise UserError(f"The walker cannot count {name!r}: {hidden}. Count the program that does without.")
    if name in _PRODUCTS:
        return Work(matmul=_PRODUCTS[name](equation))
    if name == "cond":
        return max(map(_program, equation.params["branches"]), key=lambda work: (work.flops, work.transcendental))
    inner = [] if name in _ATOMS else list(jaxprs_in_params(equation.params))
    if inner:
        return sum(map(_program, inner), Work()) * (equation.params["length"] if name == "scan" else 1)
    return _elementwise(name, equation)


def _dot(equation: Any) -> int:
    """2 for each number that comes out and each that it is summed over. In a ragged product each row meets the one matrix of
    its group, whatever a backend without such a kernel makes of it."""
    numbers = equation.params.get("dimension_numbers")
    (contracted, _), _ = numbers or equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    left, result = equation.invars[0].aval, equation.outvars[0].aval
    return 2 * result.size * math.prod(left.shape[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    """Each result meets the kernel once, the padding included."""
    kernel, features = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec[0]  # the axis of outputs
    return 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[features]


_PRODUCTS = {"dot_general": _dot, "ragged_dot_general": _dot, "conv_general_dilated": _convolution}
_REDUCTIONS = frozenset({
    "reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin",
    "reduce", "top_k",
})  # fmt: skip
# Their inner program says how two numbers are combined, not what is done once.
_ATOMS = frozenset({"scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max", "scatter", "reduce", "sort"})


def _elementwise(name: str, equation: Any) -> Work:
    if name in _MOVES:
        return Work()
    size = equation.outvars[0].aval.size
    if name in _REDUCTIONS:
        return Work(elementwise=equation.invars[0].aval.size - size)
    if name.startswith("scatter-"):
        return Work(elementwise=equation.invars[2].aval.size)
    if name == "sort":
        axis = equation.outvars[0].aval.shape[equation.params["dimension"]]
        return Work(elementwise=size * max(axis - 1, 0).bit_length())
    if name == "integer_pow":
        power = equation.params["y"]
        squarings_and_products = max(power.bit_length() + power.bit_count() - 2, 0)
        return Work(elementwise=size * (squarings_and_products + (power < 0)))
    if name == "logistic":  # written as 1 / (1 + exp(-x))
        return Work(elementwise=3 * size, transcendental=size)
    return Work(transcendental=size) if name in _TRANSCENDENTAL else Work(elementwise=size)

"""Operations by reading the program: trace a function, drop what no result needs, and add up what is left.

The function is traced on shapes, so nothing is allocated, compiled or run. What the trace holds is the program as JAX
hands it to the compiler, after differentiation: frozen weights, LoRA and remat show up by themselves.

Conventions:

- Matrix products (`dot_general`, `ragged_dot_general`, convolutions) count 2 for each multiply and add.
- All other arithmetic is counted apart, as XLA's own cost analysis prices it: one operation for each number an
  elementwise step yields, comparisons, selections and conversions of type included; a sum or maximum over n numbers is
  n - 1. What only moves numbers (reshapes, slices, gathers, transposes) is free. Transcendental functions are counted a
  third way, one each, because how many operations they are is a matter of the chip.
- A scan counts its body times its length, a `cond` its dearest branch. A `while` does not say how often it runs, so the
  caller must. A kernel that the trace cannot see into is refused, for a silent 0 would be believed.
- A product with a lone row counts as the program does it: on a CPU, twice (`leaves.project` pads it to two rows).
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
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
    "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "sqrt", "rsqrt", "cbrt", "tanh", "sin", "cos", "tan",
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
    """What one call of a function costs. The bytes are what products would move if nothing stayed near the processor."""

    matmul: int = 0
    elementwise: int = 0
    transcendental: int = 0
    product_bytes: int = 0  # operands read and results written by matrix products, each time
    scopes: dict[str, int] = dataclasses.field(default_factory=dict)  # of matmul, by the named scopes asked for

    @property
    def flops(self) -> int:
        """Products and other arithmetic together: what XLA calls `flops`."""
        return self.matmul + self.elementwise

    def __add__(self, other: "Work") -> "Work":
        names = self.scopes | other.scopes
        return Work(
            self.matmul + other.matmul,
            self.elementwise + other.elementwise,
            self.transcendental + other.transcendental,
            self.product_bytes + other.product_bytes,
            {name: self.scopes.get(name, 0) + other.scopes.get(name, 0) for name in names},
        )

    def __mul__(self, times: int) -> "Work":
        return Work(
            self.matmul * times,
            self.elementwise * times,
            self.transcendental * times,
            self.product_bytes * times,
            {name: flops * times for name, flops in self.scopes.items()},
        )


def count(f: Callable[..., Any], *args: Any, trips: int | Sequence[int] = (), scopes: Collection[str] = ()) -> Work:
    """The work of `f(*args)`. `args` are trees of arrays or of `jax.ShapeDtypeStruct`; bind what is static beforehand.

    `trips` is how often each `while` loop runs, in the order met with an outer loop before those inside it, or one
    number for all. `scopes` are names given to `jax.named_scope`: products inside are added up by the innermost of
    them, and those outside all of them under "". Differentiation is the caller's: pass the function that does it.

    Raises UserError for a `while` loop without a trip count, for trip counts left over, and for a kernel that hides
    its work.
    """
    closed = jax.make_jaxpr(f)(*args)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    walk = _Walk(trips, frozenset(scopes))
    work = walk.through(jaxpr, "")
    if walk.left():
        raise UserError(f"{walk.left()} trip counts too many: the function has {walk.loops} while loops.")
    return work


class _Walk:
    """The loops met so far, and what the caller said about them."""

    def __init__(self, trips: int | Sequence[int], scopes: frozenset[str]) -> None:
        self.trips, self.scopes, self.loops = trips, scopes, 0

    def left(self) -> int:
        """Trip counts that no loop has claimed."""
        return 0 if isinstance(self.trips, int) else len(self.trips) - self.loops

    def through(self, jaxpr: Jaxpr, scope: str) -> Work:
        """The work of a program found inside `scope`."""
        return sum((self.step(equation, scope) for equation in jaxpr.eqns), Work())

    def step(self, equation: JaxprEqn, scope: str) -> Work:
        name = equation.primitive.name
        scope = self.innermost(equation, scope)
        if name in _OPAQUE or name.startswith("dot_product_attention"):
            raise UserError(
                f"The walker cannot count {name!r}: its work is hidden in a kernel. Count the program that does without."
            )
        if name in _PRODUCTS:
            flops = _PRODUCTS[name](equation)
            scopes = {scope: flops} if self.scopes else {}
            return Work(matmul=flops, product_bytes=_bytes(*equation.invars, *equation.outvars), scopes=scopes)
        if name == "scan":
            return self.through(_only(equation), scope) * equation.params["length"]
        if name == "while":
            times = self.next_trips()
            body, test = equation.params["body_jaxpr"], equation.params["cond_jaxpr"]
            return self.through(body, scope) * times + self.through(test, scope) * (times + 1)
        if name == "cond":
            branches = [self.through(branch, scope) for branch in equation.params["branches"]]
            return max(branches, key=lambda work: (work.flops, work.transcendental))
        inner = [] if name in _ATOMS else list(jaxprs_in_params(equation.params))
        if inner:
            return sum((self.through(jaxpr, scope) for jaxpr in inner), Work())
        return _elementwise(name, equation)

    def innermost(self, equation: JaxprEqn, scope: str) -> str:
        """The last of the scopes asked for that this equation stands in."""
        stack = str(equation.source_info.name_stack) if self.scopes else ""
        names = [name.rpartition("(")[2].rstrip(")") for name in stack.split("/")]  # differentiated: transpose(jvp(name))
        return next((name for name in reversed(names) if name in self.scopes), scope)

    def next_trips(self) -> int:
        self.loops += 1
        if isinstance(self.trips, int):
            return self.trips
        if self.loops > len(self.trips):
            raise UserError(
                f"While loop {self.loops} does not say how often it runs, and {len(self.trips)} trip counts were given. "
                "Pass trips=N, or one number for each loop."
            )
        return self.trips[self.loops - 1]


def _only(equation: JaxprEqn) -> Jaxpr:
    [inner] = jaxprs_in_params(equation.params)
    return inner


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    return _over(equation, contracted)


def _ragged_dot(equation: JaxprEqn) -> int:
    """Each row meets the one matrix of its group, whatever a backend without such a kernel makes of it."""
    (contracted, _), _ = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return _over(equation, contracted)


def _over(equation: JaxprEqn, contracted: Sequence[int]) -> int:
    """2 for each number that comes out and each that it is summed over."""
    left = _shape(equation.invars[0])
    return 2 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> int:
    """Each result meets the kernel once, the padding included."""
    kernel = _shape(equation.invars[1])
    features = equation.params["dimension_numbers"].rhs_spec[0]  # the axis of output features
    return 2 * _size(equation.outvars[0]) * math.prod(kernel) // kernel[features]


_PRODUCTS = {"dot_general": _dot, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _convolution}
_REDUCTIONS = frozenset({
    "reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin",
    "reduce", "top_k",
})  # fmt: skip
# Their inner program says how two numbers are combined, not what is done once.
_ATOMS = frozenset({"scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max", "scatter", "reduce", "sort"})


def _elementwise(name: str, equation: JaxprEqn) -> Work:
    if name in _MOVES:
        return Work()
    size = _size(equation.outvars[0])
    if name in _REDUCTIONS:
        return Work(elementwise=_size(equation.invars[0]) - size)
    if name.startswith("scatter-"):
        return Work(elementwise=_size(equation.invars[2]))
    if name == "sort":
        axis = _shape(equation.outvars[0])[equation.params["dimension"]]
        return Work(elementwise=size * max(axis - 1, 0).bit_length())
    if name == "integer_pow":
        power = equation.params["y"]
        squarings_and_products = max(power.bit_length() + power.bit_count() - 2, 0)
        return Work(elementwise=size * (squarings_and_products + (power < 0)))
    if name == "logistic":  # written as 1 / (1 + exp(-x))
        return Work(elementwise=3 * size, transcendental=size)
    return Work(transcendental=size) if name in _TRANSCENDENTAL else Work(elementwise=size)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))


def _bytes(*variables: Any) -> int:
    return sum(_size(variable) * variable.aval.dtype.itemsize for variable in variables)

"""Counts the operations of a program by walking its jaxpr, without the equations that no result needs.

Nothing is allocated, compiled or run. The jaxpr is what JAX compiles, after differentiation, so
frozen weights, LoRA and remat show.

- Matrix products (`dot_general`) count 2 for each multiply and add.
- Other arithmetic counts as in XLA's cost analysis: one operation for each number of an elementwise
  result (comparisons, selections and type conversions too), n - 1 for a reduction of n numbers, 0
  for what only moves numbers. Transcendental functions count apart, one each.
- A scan is its body times its length, a `cond` its most expensive branch. Refused are a `while`,
  whose trips are unknown, products that no program here has, and kernels, whose work is hidden, but
  for fused attention: that counts in blocks.
- A product with one row counts twice on a CPU, as it is computed (`model/weights/matmul.py` pads
  it).
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval

from engine.counting.flops import twice_mean_keys
from engine.errors import UserError
from engine.model.attention_in_blocks import QUERY_BLOCK
from engine.model.native.library import target
from engine.model.ops import platform

_MOVES = frozenset(
    {
        "reshape",
        "broadcast_in_dim",
        "transpose",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "concatenate",
        "split",
        "pad",
        "rev",
        "tile",
        "squeeze",
        "iota",
        "gather",
        "scatter",
        "copy",
        "bitcast_convert_type",
        "stop_gradient",
        "optimization_barrier",
        "layout_constraint",
        "sharding_constraint",
        "device_put",
        "random_wrap",
        "random_unwrap",
        "random_seed",
        "real",
        "imag",
        "name",
    }
)
_TRANSCENDENTAL = frozenset(
    {
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "pow",
        "sqrt",
        "rsqrt",
        "cbrt",
        "tanh",
        "sin",
        "cos",
        "tan",
        "sinh",
        "cosh",
        "asin",
        "acos",
        "atan",
        "atan2",
        "asinh",
        "acosh",
        "atanh",
        "erf",
        "erfc",
        "erf_inv",
        "lgamma",
        "digamma",
    }
)
# Kernels, programs for one device of many, and products that no program here has.
_OPAQUE = frozenset(
    {
        "pure_callback",
        "io_callback",
        "ffi_call",
        "custom_call",
        "pallas_call",
        "mpmd_map",
        "shard_map",
        "triton_kernel_call",
        "ragged_dot_general",
        "conv_general_dilated",
        "stored_program",  # of engine/program_cache.py, in a command's process
    }
)


@dataclasses.dataclass(frozen=True)
class JaxprCost:
    """Operations of a program, by kind."""

    matmul: int = 0
    elementwise: int = 0
    transcendental: int = 0
    in_kernels: int = 0  # of matmul: what XLA's cost analysis does not see

    @property
    def flops(self) -> int:
        """The operations that XLA calls `flops`."""
        return self.matmul + self.elementwise

    def __add__(self, other: "JaxprCost") -> "JaxprCost":
        return JaxprCost(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, times: int) -> "JaxprCost":
        return JaxprCost(*(operations * times for operations in dataclasses.astuple(self)))


def jaxpr_cost(f: Callable[..., Any], *args: Any) -> JaxprCost:
    """Counts the operations of `f(*args)`, trees of arrays or `jax.ShapeDtypeStruct`; bind static
    arguments beforehand.

    To count a backward pass, pass a function that differentiates. Raises UserError for a `while`
    loop or a kernel.
    """
    device: Any = contextlib.nullcontext()
    if platform() == "tpu":
        # A TPU's kernel shows nothing of its shapes; a GPU's program without cuDNN is the same but
        # for attention in blocks.
        device = jax.default_device("gpu")
    with device:
        closed = jax.make_jaxpr(f)(*args)
    all_results = [True] * len(closed.jaxpr.outvars)
    jaxpr, *_ = partial_eval.dce_jaxpr(closed.jaxpr, all_results)
    return _program_cost(jaxpr)


def _program_cost(jaxpr: Jaxpr) -> JaxprCost:
    variables_read = {id(result) for result in jaxpr.outvars}
    for equation in jaxpr.eqns:
        variables_read.update(map(id, equation.invars))
    costs = [_equation_cost(equation, variables_read) for equation in jaxpr.eqns]
    return sum(costs, JaxprCost())


def _equation_cost(equation: JaxprEqn, variables_read: Collection[int]) -> JaxprCost:
    """`variables_read`: the identities of the variables that the program reads."""
    name = equation.primitive.name
    kernel = name
    if name == "ffi_call":
        kernel = equation.params["target_name"]
    if kernel.startswith(("dot_product_attention", target("causal_attention"), target("prefill_attention"))):
        is_read = [id(result) in variables_read for result in equation.outvars]
        products = _fused_attention(equation, kernel, is_read)
        return JaxprCost(matmul=products, in_kernels=products)
    if name == "while" or name in _OPAQUE:
        if name == "while":
            hidden = "how often it runs is unknown"
        else:
            hidden = "its work is hidden, or not known here"
        raise UserError(f"The walker cannot count {name!r}: {hidden}. Count the program that does without.")
    if name == "dot_general":
        return JaxprCost(matmul=_dot(equation))
    if name == "cond":
        branches = map(_program_cost, equation.params["branches"])
        return max(branches, key=lambda cost: (cost.flops, cost.transcendental))
    inner_programs = []
    if name not in _ATOMS:
        inner_programs = list(jaxprs_in_params(equation.params))
    if inner_programs:
        cost = sum(map(_program_cost, inner_programs), JaxprCost())
        if name == "scan":
            return cost * equation.params["length"]
        return cost
    return _elementwise(name, equation)


def _dot(equation: Any) -> int:
    """Returns the operations of a `dot_general`: 2 for each number of the result and of the axes that
    are summed.
    """
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    result = equation.outvars[0].aval
    return 2 * result.size * math.prod(left.shape[axis] for axis in contracted)


def _fused_attention(equation: Any, kernel: str, is_read: list[bool]) -> int:
    """Returns the operations of attention's products, in blocks if causal: q k^T and p v; in the
    backward pass dq, dk, dp for both, and dv. `is_read`: of each result, whether something reads it.

    What a kernel computes beside does not count: there q k^T again, and gradients that nothing
    reads. Over a KV cache every place counts, though a kernel reads only those that the text has
    reached: they are not known here.
    """
    B, T, N, H = equation.invars[0].aval.shape
    # `keys`: twice the mean number that a query meets
    if kernel == target("prefill_attention"):
        keys = 2 * equation.invars[3].aval.shape[2]
    elif "CAUSAL" in str(equation.params.get("mask_type", "CAUSAL")):
        keys = twice_mean_keys(T, QUERY_BLOCK)
    else:
        keys = 2 * equation.invars[1].aval.shape[1]
    q, k, v = (is_read + [True] * 3)[:3]
    if "bwd" in kernel or "backward" in kernel:
        products = q + k + (q or k) + v  # a bool counts as 1
    else:
        products = 2
    return products * B * N * H * T * keys


_REDUCTIONS = frozenset(
    {
        "reduce_sum",
        "reduce_prod",
        "reduce_max",
        "reduce_min",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "argmax",
        "argmin",
        "reduce",
        "top_k",
    }
)
# Their inner program combines two numbers, however often.
_ATOMS = frozenset(
    {"scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max", "scatter", "reduce", "sort"}
)


def _elementwise(name: str, equation: Any) -> JaxprCost:
    """Returns the cost of an equation that is neither a product nor holds a program."""
    if name in _MOVES:
        return JaxprCost()
    size = equation.outvars[0].aval.size
    if name in _REDUCTIONS:
        return JaxprCost(elementwise=equation.invars[0].aval.size - size)
    if name.startswith("scatter-"):
        return JaxprCost(elementwise=equation.invars[2].aval.size)
    if name == "sort":
        axis = equation.outvars[0].aval.shape[equation.params["dimension"]]
        return JaxprCost(elementwise=size * max(axis - 1, 0).bit_length())
    if name == "integer_pow":
        power = equation.params["y"]
        squarings_and_products = max(power.bit_length() + power.bit_count() - 2, 0)
        return JaxprCost(elementwise=size * (squarings_and_products + (power < 0)))
    if name == "logistic":  # written as 1 / (1 + exp(-x))
        return JaxprCost(elementwise=3 * size, transcendental=size)
    if name in _TRANSCENDENTAL:
        return JaxprCost(transcendental=size)
    return JaxprCost(elementwise=size)

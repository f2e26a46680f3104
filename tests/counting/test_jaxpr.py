"""`jaxpr_cost` counts each operation of a program as often as it runs, and refuses what it cannot see."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

from engine.counting.jaxpr import _TRANSCENDENTAL, JaxprCost, jaxpr_cost
from engine.errors import UserError
from engine.model import ops
from engine.model.attention import causal_attention
from engine.model.attention_in_blocks import QUERY_BLOCK, causal_attention_in_blocks
from tests.counting.shapes_only import shaped

M, N, P = 3, 5, 7
f32 = functools.partial(shaped, dtype=jnp.float32)
X, W = f32(M, N), f32(N, P)
SQUARE = f32(N, N)
PRODUCT = 2 * M * N * P
TURN = 2 * M * N * N  # X by SQUARE


def products(f, *args):
    return jaxpr_cost(f, *args).matmul


# ---- products


def test_a_product_is_two_operations_for_each_multiply_and_add():
    assert products(jnp.dot, X, W) == PRODUCT
    batched = f32(4, M, N)
    assert products(lambda x, y: jnp.einsum("bmn,bkn->bmk", x, y), batched, batched) == 4 * 2 * M * N * M
    assert products(lambda x, y: jnp.einsum("bmn,bmn->", x, y), batched, batched) == 4 * 2 * M * N
    assert products(jnp.outer, *(f32(n) for n in (M, N))) == 0  # written as a broadcast


def test_dead_code_is_not_counted():
    def f(x, w, square):
        x @ square
        return jax.jit(lambda x, w: (x @ w, x @ square))(x, w)[0]

    assert products(f, X, W, SQUARE) == PRODUCT
    assert products(lambda x, w: jax.lax.scan(lambda x, _: (x + 1, x @ w), x, length=4)[0], X, SQUARE) == 0


# ---- programs inside programs


def test_a_scan_is_its_body_times_its_length():
    looped = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=4)[0]
    assert products(looped, X, SQUARE) == 4 * TURN
    twice = lambda x, w: jax.lax.scan(lambda x, _: (looped(x, w), None), x, length=6)[0]
    assert jaxpr_cost(twice, X, SQUARE) == jaxpr_cost(lambda x, w: x @ w, X, SQUARE) * 24
    assert products(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x), X, SQUARE) == 3 * TURN


def test_of_branches_the_dearest_counts():
    choose = lambda i, x, w: jax.lax.switch(i, [lambda: x, lambda: x @ w @ w, lambda: x @ w], *())
    assert products(choose, 0, X, SQUARE) == 2 * TURN
    arithmetic = lambda x: jax.lax.cond(True, lambda x: x + x * x, lambda x: -x, x)
    assert jaxpr_cost(arithmetic, X).elementwise >= 2 * M * N


def test_it_looks_into_jit_checkpoint_and_rules_for_differentiation():
    @jax.custom_vjp
    def ruled(x, w):
        return x @ w

    ruled.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    @jax.custom_jvp
    def forward_ruled(x, w):
        return x @ w

    forward_ruled.defjvp(lambda primals, tangents: (primals[0] @ primals[1], tangents[0] @ primals[1]))

    for wrapped in (jax.jit(jnp.dot), jax.checkpoint(jnp.dot), ruled, forward_ruled, jax.named_call(jnp.dot)):
        assert products(wrapped, X, W) == PRODUCT
    slope = lambda f: jax.grad(lambda x, w: jnp.square(f(x, w)).sum(), argnums=(0, 1))
    assert products(slope(ruled), X, W) == products(slope(jnp.dot), X, W) == 3 * PRODUCT


@pytest.mark.parametrize(
    ("name", "passes"), [("dot_product_attention_fwd_wrapper", 1), ("dot_product_attention_bwd_wrapper", 2)]
)
def test_fused_attention_counts_as_attention_in_blocks(name, passes):
    """cuDNN's attention cannot be traced without a GPU, so one of its name stands in."""
    kernel, q, k = Primitive(name), f32(2, 2 * QUERY_BLOCK, 6, 4), f32(2, 2 * QUERY_BLOCK, 3, 4)
    kernel.def_abstract_eval(lambda q, k, v, **_: q)
    call = lambda mask: lambda q, k, v: kernel.bind(q, k, v, mask_type=mask)
    in_blocks = products(lambda q, k, v: causal_attention_in_blocks(q, k, v, None), q, k, k)
    assert products(call("MaskType.CAUSAL"), q, k, k) == passes * in_blocks > 0
    over_a_cache = f32(2, 5, 6, 4), f32(2, 9, 3, 4), f32(2, 9, 3, 4)
    assert products(call("MaskType.NO_MASK"), *over_a_cache) == passes * 4 * 2 * 6 * 4 * 5 * 9


@pytest.mark.parametrize("problem", ["", "there is no compiler"])
def test_attention_counts_alike_in_c_and_by_xla(monkeypatch, problem):
    """Forward and backward; whether it can be built here does not matter, for nothing is run."""
    monkeypatch.setattr(ops, "native_problem", lambda: problem)
    q, k = f32(2, 2 * QUERY_BLOCK, 6, 4), f32(2, 2 * QUERY_BLOCK, 3, 4)
    slope = jax.grad(lambda q, k, v: jnp.square(causal_attention(q, k, v, None)).sum(), (0, 1, 2))
    cost = jaxpr_cost(slope, q, k, k)
    assert cost.matmul == 3 * products(lambda q, k, v: causal_attention_in_blocks(q, k, v, None), q, k, k)
    assert cost.in_kernels == (0 if problem else cost.matmul)


def sharded(x):
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(
        lambda x: x @ x.T, mesh=jax.make_mesh((1,), ("rows",)), in_specs=spec, out_specs=spec
    )(x)


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("pure_callback", lambda x: jax.pure_callback(lambda x: x, X, x)),
        ("while", lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, jnp.square, x)),
        ("shard_map", sharded),
        ("conv_general_dilated", lambda x: jax.lax.conv(x[None, None], x[None, None], (1, 1), "SAME")),
    ],
)
def test_what_hides_its_work_is_refused_by_name(name, f):
    with pytest.raises(UserError, match=f"cannot count '{name}'"):
        jaxpr_cost(f, X)


# ---- all other arithmetic: as XLA prices it, so that totals can be compared

SINGLE = {
    "add": lambda x: x + 2.0,
    "compare and select": lambda x: jnp.where(x > 0, x, 0.5),
    "convert": lambda x: x.astype(jnp.bfloat16),
    "sum": lambda x: x.sum(-1),
    "maximum": lambda x: x.max(),
    "all": lambda x: jnp.all(x > 0),
    "square": jnp.square,
    "cube": lambda x: x**3,
    "fourth": lambda x: x**4,
    "inverse": lambda x: x**-1,
    "power": lambda x: x**1.5,
    "logistic": jax.nn.sigmoid,
    "exp": jnp.exp,
    "rsqrt": jax.lax.rsqrt,
    "turn": lambda x: jnp.flip(x.T, 0) * 1.5,
    "join": lambda x: jnp.concatenate([x, x]) - 1.0,
    "round": lambda x: jax.lax.reduce_precision(x, 8, 7),
    "shift": lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32) << 2,
    "gather": lambda x: x[jnp.array([2, 0, 1, 1])],
    "move": lambda x: x.reshape(-1)[3:9].reshape(2, 3).T,
}


# The program converts a 0.5, and adds to indices that might be negative, where XLA sees constants;
# to XLA, reading the same bits as another type is an operation.
DIFFERENT = {"compare and select": 1, "gather": 3 * 4, "shift": -M * N}


@pytest.mark.parametrize("name", SINGLE)
def test_arithmetic_is_priced_as_xla_prices_it(name):
    work = jaxpr_cost(SINGLE[name], X)
    cost = jax.jit(SINGLE[name]).lower(X).cost_analysis()
    assert (work.transcendental, work.matmul) == (cost.get("transcendentals", 0), 0)
    assert work.elementwise - cost.get("flops", 0) == DIFFERENT.get(name, 0)


@pytest.mark.parametrize("name", sorted(_TRANSCENDENTAL))
def test_a_transcendental_function_is_one_for_each_number_and_no_arithmetic(name):
    function = getattr(jax.lax, name)
    counted = jaxpr_cost(lambda x: function(x, x) if name in ("pow", "atan2") else function(x), X)
    assert counted == JaxprCost(transcendental=M * N)


def test_arithmetic_that_xla_prices_otherwise():
    """Sorting by its comparisons, an argmax by one comparison a number, a scatter by what it adds."""
    assert jaxpr_cost(lambda x: jnp.sort(x, -1), X).elementwise == M * N * 3
    assert jaxpr_cost(lambda x: x.argmax(-1), X).elementwise == M * (N - 1)
    rows = f32(2, N)
    added = jaxpr_cost(lambda x, rows: x.at[jnp.array([0, 2])].add(rows), X, rows).elementwise
    assert 2 * N <= added <= 2 * N + 8

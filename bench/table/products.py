"""A decoding step's products with weights and nothing else: no cache, no attention, no sampling.

Products of few rows run far below what square ones reach; how far depends on the weights' shapes and type. So their time
is measured beside the step's: what a step takes longer goes to its caches and to all that lies between products.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from engine.inference.decode import STEPS
from engine.model.config import ModelConfig
from engine.model.transformer import Params, logits_of
from engine.model.weights.matmul import project, project_two


@functools.partial(jax.jit, static_argnames="cfg")
def products(cfg: ModelConfig, params: Params, x: Array) -> Array:
    """Multiplies x (B, 1, D) by every matrix of the model in turn, STEPS times as in a dispatch of decoding."""
    dtype = jnp.dtype(cfg.dtype)

    def step(x: Array, _: None) -> tuple[Array, None]:
        for layer in range(cfg.layers):
            leaf = params["blocks"][str(layer)]
            mixed = project(x, leaf["qkv"], dtype)[..., : cfg.heads * cfg.head_dim]
            gate, up = project_two(project(mixed, leaf["out"], dtype), leaf["gate_up"], dtype)
            x = project(gate + up, leaf["down"], dtype)
        # The next step waits for these logits, else nobody would make them.
        return x + 0 * logits_of(cfg, params, x).max().astype(dtype), None

    return jax.lax.scan(step, x, length=STEPS)[0]


def products_alone(cfg: ModelConfig, params: Params, rows: int) -> Callable[[], Array]:
    """Returns a call of `products` for `rows` rows, compiled."""
    x = jax.random.normal(jax.random.key(0), (rows, 1, cfg.width), jnp.dtype(cfg.dtype))
    program = products.lower(cfg, params, x).compile()
    return lambda: program(params, x)

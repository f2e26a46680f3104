"""One training step to be measured: the project's own, on random bytes of a given shape."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bench.shape import Shape
from engine.model.config import ModelConfig
from engine.model.transformer import init_params
from engine.text.batch import Batch
from engine.training.step import init_state, train_step


class Work(NamedTuple):
    """The inputs of a training step: the model, its first weights, and the batch it sees at every step."""

    cfg: ModelConfig
    params: Any
    batch: Batch


def make_work(shape: Shape, dtype: Literal["bfloat16", "float32"]) -> Work:
    """Returns a model of bytes: heads 64 wide, q/k norm, SwiGLU, head of its own; weights and text are random, the same each
    time."""
    ff = -(-shape.width * 8 // 3 // 64) * 64
    cfg = ModelConfig(
        vocab=257, width=shape.width, layers=shape.layers, heads=shape.width // 64, ff=ff, context=shape.tokens, qk_norm=True,
        dtype=dtype,
    )  # fmt: skip
    params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    text = jax.random.randint(jax.random.key(1), (shape.batch, shape.tokens + 1), 0, cfg.vocab)
    positions = jnp.tile(jnp.arange(shape.tokens), (shape.batch, 1))
    return Work(cfg, params, Batch(text[:, :-1], text[:, 1:], jnp.ones((shape.batch, shape.tokens), bool), positions, None))


def make_step(cfg: ModelConfig, tx: Any, trainable: Any, frozen: Any, batch: Batch, progress: float = 0.5) -> Callable[[], Any]:
    """Returns a call that takes the next training step and returns its loss; the weights given stay as they are."""
    state = init_state(tx, jax.tree.map(jnp.copy, trainable))

    def step() -> Any:
        nonlocal state
        state, metrics = train_step(cfg, tx, state, frozen, batch, jnp.float32(progress))
        return metrics.loss

    return step

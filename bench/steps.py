"""One training step to be measured: the project's own, on random bytes of a given shape."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Shape(NamedTuple):
    """A model and its batch as `bench` writes them: LAYERSxWIDTHxTOKENSxBATCH."""

    layers: int
    width: int
    tokens: int
    batch: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def shape(text: str) -> Shape | None:
    """'6x384x256x16' -> Shape(6, 384, 256, 16); None when it is not one, or its width not a multiple of a head's 64."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts) or int(parts[1]) % 64:
        return None
    return Shape(*map(int, parts))


class Work(NamedTuple):
    """What one training step needs: the model, its first weights, and the batch it sees at every step."""

    cfg: Any
    params: Any
    batch: Any


def work(of: Shape, dtype: Literal["bfloat16", "float32"]) -> Work:
    """A model of bytes: heads 64 wide, q/k norm, SwiGLU, head of its own; weights and text are drawn, the same each time."""
    import jax
    import jax.numpy as jnp

    from engine.model.config import ModelConfig
    from engine.model.transformer import init_params
    from engine.text.batch import Batch

    ff = -(-of.width * 8 // 3 // 64) * 64
    cfg = ModelConfig(
        vocab=257, width=of.width, layers=of.layers, heads=of.width // 64, ff=ff, context=of.tokens, qk_norm=True, dtype=dtype
    )
    params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    text = jax.random.randint(jax.random.key(1), (of.batch, of.tokens + 1), 0, cfg.vocab)
    positions = jnp.tile(jnp.arange(of.tokens), (of.batch, 1))
    return Work(cfg, params, Batch(text[:, :-1], text[:, 1:], jnp.ones((of.batch, of.tokens), bool), positions, None))


def stepper(given: Work, kind: Literal["adamw", "muon"] = "adamw", progress: float = 0.5) -> Callable[[], Any]:
    """A callable that takes the next training step and returns its loss; the weights given stay as they are."""
    import jax
    import jax.numpy as jnp

    from engine.training.optimizer import OptimizerConfig, make_optimizer
    from engine.training.step import init_state, train_step

    tx = make_optimizer(OptimizerConfig(kind=kind))
    held = [init_state(tx, jax.tree.map(jnp.copy, given.params))]

    def run() -> Any:
        held[0], metrics = train_step(given.cfg, tx, held[0], {}, given.batch, jnp.float32(progress))
        return metrics.loss

    return run

"""Makes or loads the model to measure, tokens to measure it with, and training steps of a given shape."""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from pydoc_data.topics import topics  # Python's reference, on every machine
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.cli import Shape
from engine.errors import UserError
from engine.inference.engine import Engine
from engine.inference.request import Request
from engine.model.config import ModelConfig, preset
from engine.model.paths import leaf_paths, unflatten
from engine.model.transformer import init_params
from engine.storage.model_loader import load_model, locate
from engine.text.batch import Batch
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import TrainState, init_state, train_step

PROGRESS = 0.5  # through a run, for the learning rate


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """A model to measure: its name, weights, and its tokenizer; None for random weights."""

    name: str
    cfg: ModelConfig
    params: Any
    tokenizer: Any = None


def random_model(name: str, cfg: ModelConfig) -> BenchModel:
    """Returns a preset with random numbers in every leaf but the norms, also where training starts
    at zero: a model whose blocks add nothing would hide every difference between two ways of
    running it.
    """

    def init(key: Any) -> Any:
        leaves = leaf_paths(init_params(cfg, key))
        for n, (path, leaf) in enumerate(leaves.items()):
            if not path.endswith("norm"):
                scale = 0.05
                if leaf.ndim == 2:
                    inputs = leaf.shape[1] if path == "embed" else leaf.shape[0]
                    scale = inputs**-0.5
                leaves[path] = jax.random.normal(jax.random.fold_in(key, n), leaf.shape, jnp.float32) * scale
        return unflatten(leaves)

    return BenchModel(name, cfg, jax.jit(init)(jax.random.key(0)))


def load(
    name: str,
    dtype: str | None = "float32",
    on_config: Callable[[ModelConfig], None] = lambda cfg: None,
    keep_kinds: Collection[str] = (),
) -> BenchModel:
    """Loads a model by path or name; `dtype` None: its own. `on_config` gets its architecture
    before its weights are read.

    `keep_kinds`: as `load_model`.

    Raises UserError for none, and for an adapter.
    """
    location = locate(name, on_config=on_config)
    if location.format == "adapter":
        raise UserError(
            f"{location.run} holds an adapter for another model. Fold it into that one first, "
            f"python -m stages.export --model {location.path} --out FOLDER, and give --model FOLDER."
        )
    model = load_model(name, dtype=dtype, on_config=on_config, keep_kinds=keep_kinds)
    return BenchModel(model.name, model.cfg, model.params, model.tokenizer)


def answer(engine: Engine, requests: Iterable[Request]) -> list[list[int]]:
    """Returns the tokens that answer each request, submitted together to an engine that has no
    others.
    """
    answers: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            answers[event.id] += event.tokens
    return list(answers.values())


def find_model(preset_name: str, name: str | None, on_config: Callable[[ModelConfig], None]) -> BenchModel:
    """Loads the model of this name, if there is one, else returns the preset's with random weights.
    `on_config`: see `load`.
    """
    if name:
        return load(name, on_config=on_config)
    cfg = preset(preset_name)
    on_config(cfg)
    return random_model(preset_name, cfg)


def tokens_for(model: BenchModel, rows: int, length: int) -> np.ndarray:
    """Returns tokens (rows, length) int32: English for a model with a tokenizer, else random."""
    if model.tokenizer is None:
        return np.random.default_rng(0).integers(0, model.cfg.vocab, (rows, length), dtype=np.int32)
    tokens = model.tokenizer.encode("\n".join(topics.values())[: 16 * rows * length])
    return np.resize(tokens, (rows, length)).astype(np.int32)


class StepInputs(NamedTuple):
    """The inputs of a training step: the model, its first weights, and the one batch that every
    step repeats.
    """

    cfg: ModelConfig
    params: Any
    batch: Batch


def make_step_inputs(shape: Shape, dtype: Literal["bfloat16", "float32"]) -> StepInputs:
    """Returns a byte-level model, heads 64 wide, with q/k norm and an untied head; weights and text
    are random, and fixed.
    """
    ff = -(-shape.width * 8 // 3 // 64) * 64
    cfg = ModelConfig(
        vocab=257,
        width=shape.width,
        layers=shape.layers,
        heads=shape.width // 64,
        ff=ff,
        context=shape.tokens,
        qk_norm=True,
        dtype=dtype,
    )
    params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    text = jax.random.randint(jax.random.key(1), (shape.batch, shape.tokens + 1), 0, cfg.vocab)
    return StepInputs(cfg, params, next_token_batch(text))


def next_token_batch(text: Any) -> Batch:
    """text (B, T + 1) int32 -> the batch in which every token but the first is a target."""
    tokens = jnp.asarray(text[:, :-1])
    targets = jnp.asarray(text[:, 1:])
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (tokens.shape[0], 1))
    return Batch(tokens, targets, jnp.ones(tokens.shape, bool), positions, None)


class TrainingStep:
    """A compiled training step on the one batch that it repeats: a call takes the next step and
    returns its loss.

    `state` is donated. `options` are those of `train_step`, and `compiler_options`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        tx: Any,
        state: TrainState,
        frozen: Any,
        batch: Any,
        *,
        compiler_options: Any = None,
        **options: Any,
    ) -> None:
        self.state = state
        self.arguments = (frozen, batch, np.float32(PROGRESS))
        self.lowered: Any = train_step.lower(cfg, tx, state, *self.arguments, **options)
        self.program = self.lowered.compile(compiler_options)

    def __call__(self) -> Any:
        self.state, metrics = self.program(self.state, *self.arguments)
        return metrics.loss


def make_step(inputs: StepInputs, optimizer: OptimizerConfig) -> TrainingStep:
    """Returns the step that trains all weights of `inputs`, of which it makes a copy."""
    tx = make_optimizer(optimizer)
    return TrainingStep(inputs.cfg, tx, new_state(tx, inputs.params), {}, inputs.batch)


def new_state(tx: Any, trainable: Any) -> TrainState:
    """Returns the state before the first step; it copies the weights, for a step donates its state."""
    return init_state(tx, jax.tree.map(jnp.copy, trainable))

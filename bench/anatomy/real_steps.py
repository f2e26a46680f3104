"""Times calls of the compiled programs, on real weights and text."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bench.anatomy.programs import CAPACITY, CHUNK, LORA, ROWS, B, Program, T
from bench.models import BenchModel, next_token_batch, tokens_for
from engine.counting.hardware import clock
from engine.counting.params import count_params
from engine.model.cache.contiguous import make_cache
from engine.model.paths import leaf_paths, split, unflatten
from engine.model.weights.lora import LoRA
from engine.text.batch import Batch
from engine.training.lora import init_lora
from engine.training.step import init_state

PROGRESS = 0.5  # through the learning rate's schedule


def _steps_of(model: BenchModel) -> int:
    """Returns how many steps each way of training takes, within seconds on two cores."""
    return 2 if count_params(model.cfg).total > 5e7 else 10


def train(program: Program, compiled: jax.stages.Compiled, model: BenchModel, rounds: Iterator[Any]) -> float:
    """Takes training steps, interleaved with `rounds` of the machine's ceilings. Returns the seconds of the fastest."""
    _, tx, shapes, frozen_shapes, *_ = program.arguments
    paths = leaf_paths(shapes.trainable)
    if any(isinstance(leaf, LoRA) for leaf in paths.values()):
        trainable = init_lora(model.cfg, jax.random.key(1), LORA)
    else:
        trainable = jax.tree.map(jnp.copy, split(model.params, paths)[0])
    start = leaf_paths(model.params)
    frozen = unflatten({path: start[path].astype(shape.dtype) for path, shape in leaf_paths(frozen_shapes).items()})
    batches, state = _batches(model), init_state(tx, trainable)

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, frozen, next(batches), jnp.float32(PROGRESS))
        return metrics.loss

    return _fastest(step, _steps_of(model), rounds)


def _batches(model: BenchModel) -> Iterator[Batch]:
    count = _steps_of(model)
    text = tokens_for(model, count * B, T + 1)
    for n in itertools.count():
        rows = text[n % count * B : (n % count + 1) * B]
        yield next_token_batch(rows)._replace(segments=jnp.zeros((B, T), jnp.int32))


def infer(name: str, compiled: jax.stages.Compiled, model: BenchModel, params: Any, rounds: Iterator[Any]) -> float:
    """Returns the seconds of the fastest call of prefill or decode, with weights of `prepare_params`."""
    text = jnp.asarray(tokens_for(model, ROWS, CHUNK))
    cache = make_cache(model.cfg, ROWS, CAPACITY)
    inputs: tuple[Any, ...] = text, jnp.full((ROWS,), CHUNK, jnp.int32)
    read = jnp.zeros((ROWS,), jnp.int32)
    if name == "decode":
        inputs, read = (text[:, 0],), jnp.full((ROWS,), CHUNK, jnp.int32)

    def call() -> Any:
        nonlocal cache
        logits, cache = compiled(params, *inputs, cache._replace(length=read + 0))
        return logits

    return _fastest(call, 10, rounds)


def _fastest(call: Callable[[], Any], calls: int, rounds: Iterator[Any]) -> float:
    """Returns the seconds of the fastest call but the first, for noise only ever slows; every third follows a round of
    `rounds`, so that no quiet moment is the calls' alone."""
    seconds = []
    for number in range(calls):
        if number % 3 == 0:
            next(rounds)
        begin = clock()
        jax.block_until_ready(call())
        seconds.append(clock() - begin)
    return min(seconds[1:])

"""Runs the compiled programs on real weights and text: how long a call takes, and how far each weight moved.

A relative change is the norm of a weight's change over the norm of the weight, exactly 0 where every bit is the same.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.anatomy.programs import CAPACITY, CHUNK, LORA, ROWS, B, Program, T
from bench.models import BenchModel, next_token_batch, tokens_for
from engine.counting.hardware import clock
from engine.counting.params import count_params
from engine.inference.config import EngineConfig
from engine.inference.engine import Engine
from engine.inference.request import Request, SamplingParams
from engine.model.cache.contiguous import make_cache
from engine.model.paths import leaf_paths, merge, split, unflatten
from engine.model.weights.lora import LoRA, to_dense
from engine.text.batch import Batch
from engine.training.lora import init_lora
from engine.training.step import init_state

REQUESTS, PROMPT, ANSWER = 100, 12, 4  # answered by the engine; tokens of each
PROGRESS = 0.5  # through the learning rate's schedule

Changes = dict[str, float]  # path -> relative change


def steps_of(model: BenchModel) -> int:
    """Returns how many steps each stage takes, within seconds on two cores."""
    return 2 if count_params(model.cfg).total > 5e7 else 10


def train(
    program: Program, compiled: jax.stages.Compiled, model: BenchModel, rounds: Iterator[Any]
) -> tuple[float, dict[str, Changes]]:
    """Takes training steps, in turns with `rounds` of the machine's ceilings.

    Returns the seconds of the fastest but the first, and the changes of the model's weights. Under LoRA those are the base's,
    and "with its pairs" those of the weights with the pairs added.
    """
    _, tx, shapes, frozen_shapes, *_ = program.arguments
    paths = leaf_paths(shapes.trainable)
    has_pairs = any(isinstance(leaf, LoRA) for leaf in paths.values())
    if has_pairs:
        trainable = init_lora(model.cfg, jax.random.key(1), LORA)
    else:
        trainable = jax.tree.map(jnp.copy, split(model.params, paths)[0])
    start = leaf_paths(model.params)
    frozen = unflatten({path: start[path].astype(shape.dtype) for path, shape in leaf_paths(frozen_shapes).items()})
    before = {path: np.array(leaf) for path, leaf in leaf_paths(frozen).items()}
    batches, state = _batches(model), init_state(tx, trainable)

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, frozen, next(batches), jnp.float32(PROGRESS))
        return metrics.loss

    seconds = _fastest(step, steps_of(model), rounds)
    changes = {path: relative_change(before[path], leaf) for path, leaf in leaf_paths(frozen).items()}
    if has_pairs:
        merged = leaf_paths(merge(state.trainable, model.params))
        pairs = {path: relative_change(start[path], to_dense(leaf)) for path, leaf in merged.items()}
        return seconds, {"": changes, "with its pairs": pairs}
    changes |= {path: relative_change(start[path], leaf) for path, leaf in leaf_paths(state.trainable).items()}
    return seconds, {"": {path: changes[path] for path in start}}


def _batches(model: BenchModel) -> Iterator[Batch]:
    count = steps_of(model)
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


def answer(model: BenchModel, params: Any) -> tuple[int, Changes]:
    """Answers REQUESTS requests through the engine; returns the tokens it gave, and how its weights changed."""
    before = {path: np.array(leaf) for path, leaf in leaf_paths(params).items()}
    engine = Engine(model.cfg, params, EngineConfig(8, CHUNK // 2, chunk=CHUNK // 2, tail=PROMPT + 4))
    for prompt in tokens_for(model, REQUESTS, PROMPT).tolist():
        engine.submit(Request(tuple(prompt), SamplingParams(max_tokens=ANSWER, temperature=1.0)))
    answer_tokens = 0
    while engine.busy:
        answer_tokens += sum(len(event.tokens) for event in engine.step())
    return answer_tokens, {path: relative_change(before[path], leaf) for path, leaf in leaf_paths(engine.params).items()}


def relative_change(before: Any, after: Any) -> float:
    """Returns the norm of after - before over that of before; 0 exactly when all bits are equal, and never else."""
    old, new = np.asarray(before), np.asarray(after)
    if old.tobytes() == new.tobytes():
        return 0.0
    old, new = old.astype(np.float32), new.astype(np.float32)
    change, size = (float(np.linalg.norm(x.ravel())) for x in (new - old, old))
    return change / (size or 1.0) or math.ulp(0.0)


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

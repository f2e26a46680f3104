"""Makes the programs whose memory is drawn, of shapes that stand for arrays: nothing is allocated."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engine.inference.decode import decode_step, decode_steps, prefill, prepare_params
from engine.inference.sampling import SamplingArrays
from engine.mesh import layout
from engine.model.cache.contiguous import make_cache
from engine.model.config import LoraConfig, ModelConfig
from engine.model.ops import platform
from engine.model.paths import split
from engine.model.transformer import init_params
from engine.model.weights.int8 import matmul_rules, quantize
from engine.model.weights.matmul import cast_matrices
from engine.text.batch import Batch
from engine.training.freeze import select_trainable
from engine.training.lora import init_lora
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import LORA_COMPILER_OPTIONS, NEXT_TOKEN, Objective, init_state, train_step

B, T = 4, 256  # of a training batch: two blocks of queries
ROWS, CAPACITY, CHUNK = 5, 192, 64  # of inference; ROWS is no other size, so that a shape tells what it is
LORA = LoraConfig(rank=4)


class Program(NamedTuple):
    """A jitted function with its arguments, and the compiler options that the product gives it."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, str] | None = None


Make = Callable[[ModelConfig], Program]


def shape_of(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def batch_shapes(rows: int = B, tokens: int = T) -> Batch:
    ids = shape_of(jnp.int32, rows, tokens)
    return Batch(ids, ids, shape_of(bool, rows, tokens), ids, ids)


@functools.cache
def params_shapes(cfg: ModelConfig) -> Any:
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def serving_params(cfg: ModelConfig, weights: Any = "plain") -> Any:
    """Returns shapes of weights as served: `plain` in the compute dtype, `int8` as W8A8, `full` as int8 that is widened."""
    return _serving_params(cfg, weights, platform(), layout.column_shards() == 1)


@functools.cache
def _serving_params(cfg: ModelConfig, weights: Any, _: str, whole: bool) -> Any:
    """By platform, because each has its own layout of int8 weights."""
    rules = lambda params: matmul_rules(params, weights)
    make = lambda params: prepare_params(cfg, params if weights == "plain" else quantize(params, rules(params)), whole)
    return jax.eval_shape(make, params_shapes(cfg))


@functools.cache
def adapter_and_base(cfg: ModelConfig, base: str) -> tuple[Any, Any]:
    """Returns the shapes of an adapter of every matrix, and of its frozen base, plain or int8."""
    freeze = lambda params: cast_matrices(
        quantize(params, matmul_rules(params, "full")) if base == "int8" else params, cfg.dtype
    )
    adapters = jax.eval_shape(lambda: init_lora(cfg, jax.random.key(0), LORA))
    return adapters, jax.eval_shape(freeze, params_shapes(cfg))


def step_program(
    objective: Objective = NEXT_TOKEN, data: Callable[[], Any] = batch_shapes, kind: Any = "adamw", lora: str | None = None,
    microbatches: int = 1, remat: Any = None, **rules: list[str],
) -> Make:  # fmt: skip
    """Makes a training step of what `rules` select, or of an adapter on a base that is `lora`: plain or int8.

    With `remat` (none or block) the layers are a scan.
    """

    def make(cfg: ModelConfig) -> Program:
        if remat:
            cfg = dataclasses.replace(cfg, scan=True, remat=remat)
        if lora:
            trainable, frozen = adapter_and_base(cfg, lora)
        else:
            trainable, frozen = split(params_shapes(cfg), select_trainable(cfg, **rules).trainable_paths.weights)
            frozen = jax.eval_shape(lambda frozen: cast_matrices(frozen, cfg.dtype), frozen)
        tx = make_optimizer(OptimizerConfig(kind=kind))
        state = jax.eval_shape(lambda trainable: init_state(tx, trainable), trainable)
        arguments = cfg, tx, state, frozen, data(), shape_of(jnp.float32), microbatches, objective
        return Program(train_step, arguments, LORA_COMPILER_OPTIONS if lora == "int8" else None)

    return make


def prefill_program(weights: str = "plain", rows: int = ROWS) -> Make:
    def make(cfg: ModelConfig) -> Program:
        cache, lengths = jax.eval_shape(lambda: make_cache(cfg, rows, CAPACITY)), shape_of(jnp.int32, rows)
        return Program(prefill, (cfg, serving_params(cfg, weights), shape_of(jnp.int32, rows, CHUNK), lengths, cache))

    return make


def decode_program(function: Any, weights: str = "plain") -> Make:
    def make(cfg: ModelConfig) -> Program:
        cache = jax.eval_shape(lambda: make_cache(cfg, ROWS, CAPACITY))
        options = [sampling_shapes(ROWS)] if function is decode_steps else []
        return Program(function, (cfg, serving_params(cfg, weights), shape_of(jnp.int32, ROWS), cache, *options))

    return make


def sampling_shapes(rows: int) -> SamplingArrays:
    number = shape_of(jnp.float32, rows)
    return SamplingArrays(number, shape_of(jnp.int32, rows), number, number, shape_of(jnp.uint32, rows))


def drawn_programs(cfg: ModelConfig) -> dict[str, tuple[str, Make]]:
    """Returns name -> (what it works on, its maker). Half of a model needs two layers."""
    batch, half = f"{B} sequences of {T} tokens", cfg.layers // 2
    with_remat = lambda cfg: step_program()(dataclasses.replace(cfg, remat="block"))
    programs: dict[str, tuple[str, Make]] = {"training": (batch, step_program())}
    if half:
        programs["bottom half frozen"] = batch, step_program(freeze=[f"bottom:{half}"])
    programs |= {
        "LoRA": (batch, step_program(lora="plain")),
        "gradient checkpointing": (batch, with_remat),
        "prefill": (f"{ROWS} prompts of {CHUNK} tokens", prefill_program()),
        "decode": (f"one token for each of {ROWS} requests, caches of {CAPACITY} tokens", decode_program(decode_step)),
    }
    return programs


def compile_drawn(cfg: ModelConfig) -> Iterator[tuple[str, str, Program, jax.stages.Compiled]]:
    """Yields (name, what it works on, the program, the same compiled)."""
    for name, (work, make) in drawn_programs(cfg).items():
        program = make(cfg)
        yield name, work, program, program.function.lower(*program.arguments).compile(program.options)

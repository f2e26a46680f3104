"""Every program of the product, by name: for laws that hold for all of them.

    program = PROGRAMS["train step, LoRA"](cfg)
    program.function.lower(*program.arguments).compile(program.options)

Arguments are shapes without a device, so a program is as large as its config and costs nothing
until it is compiled, and it can be exported for another platform.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from engine.inference.backend import ByXla, choose_backend
from engine.inference.config import EngineConfig
from engine.inference.decode import decode_steps, prefill, prepare_params
from engine.inference.request import SamplingParams
from engine.inference.runner import empty_stacks, idle_programs
from engine.inference.sampling import SamplingArrays, make_token_counts, sampling_arrays
from engine.mesh import layout
from engine.mesh.rules import leaf_spec
from engine.model.cache import segmented
from engine.model.cache.segmented import KVDtype
from engine.model.config import LoraConfig, ModelConfig
from engine.model.loss import score, summed_loss
from engine.model.ops import platform
from engine.model.paths import merge, split
from engine.model.transformer import forward, init_params, make_cache
from engine.model.weights import block_layout, int8
from engine.model.weights.block_layout import GROUP, packed_shape
from engine.model.weights.blocks import Blocks, Rounding, factors_to_train, round_to_blocks, with_factors
from engine.model.weights.convert import cast_matrices
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import init_lora
from engine.text.batch import Batch
from engine.training.freeze import select_trainable
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.preference import Preferences, pair_logprobs, preference_objective
from engine.training.reinforce import PolicyBatch, grpo, log_probabilities
from engine.training.step import (
    LORA_COMPILER_OPTIONS,
    NEXT_TOKEN,
    Objective,
    TrainState,
    gradient_norms,
    init_state,
    train_step,
)

B, T = 4, 256  # of a training batch: two blocks of queries
# of inference; ROWS is no other size, so that a shape tells what it is
ROWS, CAPACITY, CHUNK = 5, 192, 64
LORA = LoraConfig(rank=4)
TAIL = 16  # tokens of a short chunk
# Two members of the family that share few options, large enough for XLA to choose the kernels of
# real models. One layer, for the programs are many; two where layers differ or a loop goes over
# them: `step_program`.
QWEN3 = ModelConfig(300, 96, 1, 6, 160, 512, kv_heads=3, head_dim=16, qk_norm=True)
PAIRED = dataclasses.replace(QWEN3, kv_heads=2)  # which tensor=2 divides
QWEN2 = ModelConfig(
    300, 96, 1, 6, 160, 512, kv_heads=6, head_dim=16, qkv_bias=True, tied=True, dtype="float32"
)


class Program(NamedTuple):
    """A jitted function with its arguments, and the compiler options that the product gives it."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, str] | None = None


Make = Callable[[ModelConfig], Program]


def shape_of(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def blocks_shape(cfg: Any) -> Blocks:
    """A weight of one block an output, in Q4_1."""
    packed: Any = shape_of(jnp.uint8, *packed_shape(cfg.ff, GROUP, "Q4_1"))
    return Blocks(packed, cfg.ff)


def factors_shape(cfg: Any) -> Any:
    return shape_of(jnp.float32, *block_layout.factors_shape(cfg.ff, GROUP, "Q4_1"))


def batch_shapes(rows: int = B, tokens: int = T) -> Batch:
    ids = shape_of(jnp.int32, rows, tokens)
    return Batch(ids, ids, shape_of(bool, rows, tokens), ids, ids)


@functools.cache
def params_shapes(cfg: ModelConfig) -> Any:
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def serving_params(cfg: ModelConfig, weights: Any = "plain") -> Any:
    """Returns shapes of weights as served: `plain` in the compute dtype, `int8` as W8A8, `full` as
    int8 that is widened.
    """
    return _serving_params(cfg, weights, platform(), layout.column_shards() == 1)


@functools.cache
def _serving_params(cfg: ModelConfig, weights: Any, _: str, whole: bool) -> Any:
    """By platform, because each has its own layout of int8 weights."""
    make = lambda params: prepare_params(
        cfg, params if weights == "plain" else quantize(params, weights), whole
    )
    return jax.eval_shape(make, params_shapes(cfg))


@functools.cache
def adapter_and_base(cfg: ModelConfig, base: str) -> tuple[Any, Any]:
    """Returns the shapes of an adapter of every matrix, and of its frozen base, plain or int8."""
    freeze = lambda params: cast_matrices(quantize(params, "full") if base == "int8" else params, cfg.dtype)
    adapters = jax.eval_shape(lambda: init_lora(cfg, jax.random.key(0), LORA))
    return adapters, jax.eval_shape(freeze, params_shapes(cfg))


def step_program(
    objective: Objective = NEXT_TOKEN,
    data: Callable[[], Any] = batch_shapes,
    kind: Any = "adamw",
    lora: str | None = None,
    microbatches: int = 1,
    remat: Any = None,
    **rules: list[str],
) -> Make:
    """Makes a training step of what `rules` select, or of an adapter on a base that is `lora`:
    plain or int8.

    With `remat` (none or block) the layers are a scan.
    """

    def make(cfg: ModelConfig) -> Program:
        if remat:
            cfg = dataclasses.replace(cfg, scan=True, remat=remat)
        if remat or rules:
            cfg = dataclasses.replace(cfg, layers=2)
        if lora:
            trainable, frozen = adapter_and_base(cfg, lora)
        else:
            trainable, frozen = split(params_shapes(cfg), select_trainable(cfg, **rules)[0].weights)
            frozen = jax.eval_shape(lambda frozen: cast_matrices(frozen, cfg.dtype), frozen)
        tx = make_optimizer(OptimizerConfig(kind=kind))
        state = jax.eval_shape(lambda trainable: init_state(tx, trainable), trainable)
        arguments = cfg, tx, state, frozen, data(), shape_of(jnp.float32), microbatches, objective
        return Program(train_step, arguments, LORA_COMPILER_OPTIONS if lora == "int8" else None)

    return make


def prefill_program(weights: str = "plain", rows: int = ROWS) -> Make:
    def make(cfg: ModelConfig) -> Program:
        cache, lengths = jax.eval_shape(lambda: make_cache(cfg, rows, CAPACITY)), shape_of(jnp.int32, rows)
        return Program(
            prefill, (cfg, serving_params(cfg, weights), shape_of(jnp.int32, rows, CHUNK), lengths, cache)
        )

    return make


def decode_program(weights: str = "plain") -> Make:
    def make(cfg: ModelConfig) -> Program:
        cache = jax.eval_shape(lambda: make_cache(cfg, ROWS, CAPACITY))
        arguments = cfg, serving_params(cfg, weights), shape_of(jnp.int32, ROWS), cache, sampling_shapes(ROWS)
        return Program(decode_steps, arguments)

    return make


def sampling_shapes(rows: int) -> SamplingArrays:
    return jax.tree.map(lambda leaf: shape_of(leaf.dtype, rows), sampling_arrays([SamplingParams()]))


def text_shapes() -> Batch:
    """Returns the shapes of a batch of one text a row, not packed."""
    return batch_shapes()._replace(segments=None)


def preference_shapes() -> Preferences:
    return Preferences(batch_shapes(), batch_shapes(), shape_of(jnp.float32, B, 2), shape_of(jnp.float32, B))


def rollout_shapes() -> PolicyBatch:
    return PolicyBatch(batch_shapes(), shape_of(jnp.float32, B), *[shape_of(jnp.float32, B, T)] * 2)


def initial_state(kind: Any) -> Make:
    """Makes random weights and the optimizer's state at once, as `stages.train` does."""
    make = lambda cfg: init_state(
        make_optimizer(OptimizerConfig(kind=kind)), init_params(cfg, jax.random.key(0))
    )
    return lambda cfg: Program(jax.jit(make, static_argnums=0), (cfg,))


def adapter_loss(base: str) -> Make:
    def make(cfg: ModelConfig) -> Program:
        adapters, frozen = adapter_and_base(cfg, base)
        return Program(score, (cfg, merge(adapters, frozen), batch_shapes()))

    return make


TRAINING: dict[str, Make] = {
    "initial state, AdamW": initial_state("adamw"),
    "initial state, Muon": initial_state("muon"),
    "initial adapter": lambda cfg: Program(
        jax.jit(init_lora, static_argnums=(0, 2)), (cfg, jax.eval_shape(jax.random.key, 0), LORA)
    ),
    "train step, AdamW": step_program(),
    "train step, Muon": step_program(kind="muon"),
    "train step, microbatches": step_program(microbatches=2),
    "train step, Muon, scan": step_program(
        data=text_shapes, kind="muon", remat="none"
    ),  # as stages.train runs off a CPU
    "train step, scan and remat": step_program(data=text_shapes, remat="block"),
    "train step, LoRA, remat": step_program(lora="plain", remat="block"),
    "train step, bottom frozen": step_program(freeze=["bottom:1"]),
    "train step, top frozen": step_program(freeze=["top:1"]),
    "train step, head alone": step_program(train=["head"]),
    "train step, LoRA": step_program(lora="plain"),
    "train step, LoRA on int8": step_program(lora="int8", microbatches=2),
    "train step, preference": step_program(preference_objective(), preference_shapes, lora="plain"),
    "train step, preference, all": step_program(preference_objective(), preference_shapes),
    "train step, KTO": step_program(preference_objective("kto"), preference_shapes, lora="plain"),
    "train step, reinforce": step_program(grpo(0.2, 0.1), rollout_shapes, lora="plain"),
    "gradient norms": lambda cfg: Program(gradient_norms, (cfg, params_shapes(cfg), {}, batch_shapes())),
    "loss": lambda cfg: Program(
        jax.jit(summed_loss, static_argnums=0), (cfg, params_shapes(cfg), batch_shapes())
    ),
    "pair log-probabilities": lambda cfg: Program(
        pair_logprobs, (cfg, serving_params(cfg), preference_shapes())
    ),
    "log-probabilities": lambda cfg: Program(log_probabilities, (cfg, serving_params(cfg), batch_shapes())),
    "loss with an adapter": adapter_loss("plain"),
    "loss with an adapter on int8": adapter_loss("int8"),
}


def engine_program(
    name: str,
    weights: str = "plain",
    kv_dtype: KVDtype = "bfloat16",
    slots: int = ROWS,
    adapters: int = 0,
    embeds: bool = False,
) -> Make:
    """Makes a program of an engine by its name in `idle_programs`."""

    def make(cfg: ModelConfig) -> Program:
        # the kernels in C do without programs that clear and copy
        backend = ByXla() if name in ("clear_slot", "copy_slot") else choose_backend()
        config = EngineConfig(
            slots,
            CAPACITY,
            kv_dtype=kv_dtype,
            prefix_cache_bytes=1,
            chunk=CHUNK,
            tail=TAIL,
            embeds=embeds,
            adapters=adapters,
            backend=backend,
        )
        segments = jax.eval_shape(lambda: backend.make_segments(cfg, slots, config.edges, kv_dtype))
        counts = jax.eval_shape(lambda: make_token_counts(cfg, config.rows))
        params = serving_params(cfg, weights)
        stacks = jax.eval_shape(lambda: empty_stacks(params, config))
        function, arguments, _ = idle_programs(cfg, config, params, segments, counts, stacks)[name]
        plain = lambda leaf: shape_of(leaf.dtype, *leaf.shape) if hasattr(leaf, "shape") else leaf
        return Program(function, jax.tree.map(plain, arguments))

    return make


INFERENCE: dict[str, Make] = {  # the weights are the second argument
    "forward": lambda cfg: Program(
        jax.jit(forward, static_argnums=0),
        (cfg, serving_params(cfg), *[shape_of(jnp.int32, ROWS, CHUNK)] * 2),
    ),
    "score": lambda cfg: Program(score, (cfg, serving_params(cfg), batch_shapes(ROWS, CHUNK))),
    "score, int8": lambda cfg: Program(score, (cfg, serving_params(cfg, "int8"), batch_shapes(ROWS, CHUNK))),
    "prefill": prefill_program(),
    "prefill, one prompt": prefill_program(rows=1),
    "prefill, int8": prefill_program("int8"),
    "prefill, int8 widened": prefill_program("full"),
    "decode_steps": decode_program(),
    "decode_steps, int8": decode_program("int8"),
    "decode_steps, int8 widened": decode_program("full"),
    "decode in one slot": engine_program("decode", slots=1),
    "prefill_chunk": engine_program("prefill_chunk"),
    "prefill_tail": engine_program("prefill_tail"),
    "prefill_chunk, embeddings": engine_program("prefill_chunk", embeds=True),
    "prefill_chunk, int8": engine_program("prefill_chunk", "int8", "int8"),
    "decode_slots": engine_program("decode"),
    "decode_slots, int8": engine_program("decode", "int8", "int8"),
    "decode_slots, float32 cache": engine_program("decode", "plain", "float32"),
    "decode_slots, adapters": engine_program("decode", "int8", "int8", adapters=3),
    "prefill_chunk, adapters": engine_program("prefill_chunk", "int8", "int8", adapters=3),
}

WITHOUT_WEIGHTS: dict[str, Make] = {  # they read none, or make them
    "quantize": lambda cfg: Program(
        int8._quantize_jitted,  # noqa: SLF001
        (shape_of(jnp.float32, cfg.width, cfg.ff), "int8", 1),
    ),
    "round to blocks": lambda cfg: Program(round_to_blocks, (shape_of(jnp.float32, GROUP, cfg.ff), "Q4_1")),
    "factors to train": lambda cfg: Program(factors_to_train, (blocks_shape(cfg),)),
    "with factors": lambda cfg: Program(with_factors, (blocks_shape(cfg), factors_shape(cfg))),
    "Blocks.weight_of": lambda cfg: Program(Blocks.weight_of, (blocks_shape(cfg), factors_shape(cfg))),
    "Rounding.weight_of": lambda cfg: Program(
        Rounding.weight_of, (Rounding("Q4_0", 1), shape_of(jnp.float32, GROUP, cfg.ff))
    ),
    "scatter": lambda cfg: Program(
        segmented._scatter,  # noqa: SLF001
        (*[shape_of(jnp.float32, ROWS, 2, CHUNK, 1)] * 2, shape_of(jnp.int32, ROWS, 2)),
    ),
    **{
        name: engine_program(name)
        for name in ("clear_slot", "copy_slot", "set_token_counts", "read_chunk", "write_chunk")
    },
}

PROGRAMS = TRAINING | INFERENCE | WITHOUT_WEIGHTS


def lay_out(program: Program, mesh: Any) -> Program:
    """Cuts a program's weights and moments over the mesh that it is traced on, by the rules of
    `engine/mesh/layout.py`.
    """

    def place(keys: Any, leaf: Any) -> Any:
        spec = leaf_spec(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf.shape, mesh.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def place_all(tree: Any) -> Any:
        return jax.tree.map_with_path(place, tree) if isinstance(tree, dict | TrainState) else tree

    return program._replace(arguments=tuple(map(place_all, program.arguments)))

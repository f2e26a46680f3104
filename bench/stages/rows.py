"""The rows of the stage table: each one program, its expected cost, and how to run it once.

Training runs forward and backward; evaluation, prefill, prefill into a server's slot and decoding
run forward alone.
"""

import dataclasses
import functools
import operator
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.models import TrainingStep, new_state
from bench.stages.checks import SLOTS
from engine.by_hand import adamw
from engine.by_hand import model as by_hand
from engine.by_hand.model import to_numpy, tree_map
from engine.counting.flops import (
    Flops,
    add_layers,
    flops_by_layer,
    forward_flops,
    prefill_flops,
    train_flops,
)
from engine.counting.jaxpr import JaxprCost, jaxpr_cost
from engine.counting.memory import inference_bytes, inference_memory, train_bytes, training_memory
from engine.counting.program_flops import decode_program_flops, prefill_program_flops
from engine.counting.request_flops import prefilled_parts
from engine.counting.xla import xla_flops, xla_peak
from engine.inference.backend import MIN_ROWS, choose_backend
from engine.inference.config import CHUNK as SLOT_CHUNK
from engine.inference.decode import CHUNK, STEPS, decode_steps, prefill
from engine.inference.request import SamplingParams
from engine.inference.runner import prefill_chunk, read_chunk, write_chunk
from engine.inference.sampling import sampling_arrays
from engine.model.attention_in_blocks import QUERY_BLOCK
from engine.model.chunked_loss import CHUNK as LOSS_CHUNK
from engine.model.config import LoraConfig, ModelConfig
from engine.model.loss import LOGITS_LIMIT, score
from engine.model.ops import ops
from engine.model.paths import leaf_paths, merge, split
from engine.model.trainable import TrainablePaths, all_trainable, lora_only
from engine.model.transformer import hidden_states, logits_of, make_cache
from engine.model.weights.convert import cast_matrices
from engine.model.weights.int8 import Int8
from engine.model.weights.lora import init_lora
from engine.text.batch import Batch
from engine.training.freeze import select_trainable
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.preference import Preferences, pair_logprobs, preference_objective
from engine.training.step import NEXT_TOKEN, Objective, loss_and_gradient, train_step

ADAPTER = LoraConfig(rank=8, targets=("q", "v"))
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row before it is timed: `run` makes a call on `tokens` tokens and returns what the caller must wait for.

    Operations and bytes are those of one call. `weights` returns the model's weights, which it may have changed.
    """

    name: str
    stage: str  # training, fine-tuning, inference, decode, by hand
    run: Callable[[], Any]
    weights: Callable[[], Any]
    tokens: int
    formula: Flops
    peak_bytes: int | None  # that the compiled program needs, by XLA
    predicted_bytes: int  # the same, by formula
    traffic: int  # bytes that it must read and write
    layers: Sequence[Flops] = ()  # of a training step: the formula of each block, and last of the head
    program: Any = None  # compiled; None for NumPy
    walker: JaxprCost | None = None
    update: int = 0  # operations outside the gradient: clipping, the optimizer, the guard
    xla: int | None = None  # the operations, by XLA
    slots: int | None = None
    series: str | None = None
    dtype: str = "bfloat16"  # that its products multiply: decides its ceiling

    @property
    def counters_differ(self) -> str | None:
        """Returns why not all three counters say the same of it to a hundredth, None where they do."""
        if self.walker is None or self.xla is None:
            return "NumPy runs it: there is no program to walk or to compile."
        counted = self.walker.flops + self.update
        if self.walker.matmul == self.formula.total and abs(self.xla - counted) <= 0.01 * counted:
            return None
        if self.stage == "decode":
            return "of sampling XLA counts a loop of 32 steps once, and each number of a running sum as a sum of its own."
        return "the reason is not known."

    @property
    def utilisation_of(self) -> str:
        """Returns 'MBU' (share of bytes/s) for the stage `decode` and calls without products, else
        'MFU' (share of FLOP/s).
        """
        if self.stage == "decode" or not self.formula.total:
            return "MBU"
        return "MFU"


def compile_program(
    function: Any, static: tuple[Any, ...], *args: Any, calls: int = 1, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Compiles a jitted function for its arguments; returns the program, and the cost of `calls` as
    fields of a Row.

    `static` are its first arguments; `options` are static too, of which `steps` are those of a
    loop.
    """
    lowered = function.lower(*static, *args, **options)
    program = lowered.compile()
    traced = functools.partial(function, *static, **options)
    return program, cost_of(lowered, program, traced, *args, calls=calls, steps=options.get("steps", 1))


def cost_of(
    lowered: Any, program: Any, function: Any, *args: Any, calls: int = 1, steps: int = 1
) -> dict[str, Any]:
    """Returns the cost of `calls` of a program, compiled of `function`. XLA counts the body of a
    loop of `steps` once.

    It counts the program as lowered, the same on every processor: a compiled one repeats work in
    fusions and converts types. It sees nothing of a kernel: the walker's products of those are
    added.
    """
    walker = jaxpr_cost(function, *args) * calls
    xla = xla_flops(lowered) * calls * steps + walker.in_kernels
    return {"program": program, "peak_bytes": xla_peak(program), "walker": walker, "xla": xla}


@dataclasses.dataclass(frozen=True)
class TrainingKind:
    """A way of training the model, as a row of the table."""

    name: str
    stage: str
    trainable_paths: TrainablePaths
    preference: bool = False


def training_kinds(cfg: ModelConfig) -> list[TrainingKind]:
    """Returns the ways of training that the table compares; half a model needs two layers."""
    half = cfg.layers // 2
    every = all_trainable(cfg)
    lora = lora_only(cfg, ADAPTER)
    # The last block alone: no norm above it, no head.
    last = TrainablePaths(
        frozenset(path for path in every.weights if path.startswith(f"blocks/{cfg.layers - 1}/"))
    )
    fine_tuning = {"full fine-tuning": every}
    if half:
        for end in ("bottom", "top"):
            fine_tuning[f"{end} half frozen"], _ = select_trainable(cfg, freeze=[f"{end}:{half}"])
        fine_tuning["last layer"] = last
    fine_tuning["head only"], _ = select_trainable(cfg, train=["head"])
    fine_tuning[f"LoRA rank {ADAPTER.rank} on q and v"] = lora
    return [
        TrainingKind("pre-training step", "training", every),
        *(TrainingKind(name, "fine-tuning", paths) for name, paths in fine_tuning.items()),
        TrainingKind("preference with that LoRA", "fine-tuning", lora, preference=True),
    ]


def training_row(
    cfg: ModelConfig, params: Any, kind: TrainingKind, batch: Batch, optimizer: OptimizerConfig = OPTIMIZER
) -> Row:
    """Compiles a step of `kind` on the batch; `params` are copied where they train.

    Frozen matrices are stored in the compute type. In fine-tuning only the second half of each row
    counts in the loss, as the completions of a conversation do.
    """
    B, T = batch.tokens.shape
    paths = kind.trainable_paths
    tx = make_optimizer(optimizer)
    if paths.adapted:
        trainable = init_lora(cfg, jax.random.key(1), ADAPTER)
        frozen = cast_matrices(params, cfg.dtype)
    else:
        trainable, rest = split(params, paths.weights)
        frozen = cast_matrices(rest, cfg.dtype)
    if kind.stage == "fine-tuning":
        batch = batch._replace(mask=batch.mask & (jnp.arange(T) >= T // 2))
    data: Any = batch
    objective: Objective = NEXT_TOKEN
    if kind.preference:
        objective = preference_objective("dpo", 0.1)
        pairs = Preferences(every_second_row(batch, 0), every_second_row(batch, 1))
        data = pairs._replace(reference=pair_logprobs(cfg, frozen, pairs))
    step = TrainingStep(cfg, tx, new_state(tx, trainable), frozen, data, objective=objective)
    program = functools.partial(train_step, cfg, tx, objective=objective)
    cost = cost_of(step.lowered, step.program, program, step.state, *step.arguments)
    gradient = functools.partial(loss_and_gradient, cfg, objective=objective)
    walker = jaxpr_cost(gradient, trainable, frozen, data)
    update = cost["walker"].elementwise - walker.elementwise
    loss_chunk = None
    if cfg.head_path in trainable and 4 * B * T * cfg.vocab > LOGITS_LIMIT:  # a frozen head goes by rows
        loss_chunk = LOSS_CHUNK
    layers = flops_by_layer(cfg, T, rows=B * T, attention=QUERY_BLOCK, trainable=paths, loss_chunk=loss_chunk)

    def weights() -> Any:
        if paths.weights:
            return merge(step.state.trainable, frozen)
        return (frozen, step.state.trainable)

    return Row(
        name=kind.name,
        stage=kind.stage,
        run=step,
        weights=weights,
        tokens=B * T,
        formula=add_layers(layers),
        layers=layers,
        predicted_bytes=training_memory(cfg, B, T, trainable=paths).total,
        traffic=train_bytes(cfg, B, T, trainable=paths).total,
        update=update,
        dtype=cfg.dtype,
        **cost | {"walker": walker},
    )


def every_second_row(batch: Batch, first: int) -> Batch:
    return jax.tree.map(operator.itemgetter(slice(first, None, 2)), batch)


def evaluation_row(cfg: ModelConfig, params: Any, batch: Batch) -> Row:
    """Returns the row that scores a batch: the forward pass of all ratios."""
    B, T = batch.tokens.shape
    program, cost = compile_program(score, (cfg,), params, batch)

    def run() -> Any:
        return program(params, batch)

    return Row(
        name="evaluation forward",
        stage="inference",
        run=run,
        weights=lambda: params,
        tokens=B * T,
        formula=forward_flops(cfg, T, attention=QUERY_BLOCK) * (B * T),
        dtype=cfg.dtype,
        **cost,
        **_predicted(cfg, B, 0, tokens=T, every_logit=True),
    )


def prefill_row(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Row:
    """Returns the row that prefills a batch of prompts, tokens (B, T) int32, CHUNK tokens at a
    time.
    """
    B, T = tokens.shape
    T -= T % CHUNK
    pieces = [jnp.asarray(tokens[:, start : start + CHUNK]) for start in range(0, T, CHUNK)]
    lengths = jnp.full((B,), CHUNK, jnp.int32)
    cache = make_cache(cfg, B, T)
    chunks = len(pieces)
    program, cost = compile_program(prefill, (cfg,), params, pieces[0], lengths, cache, calls=chunks)

    def run() -> Any:
        nonlocal cache
        cache = cache._replace(length=jnp.zeros((B,), jnp.int32))
        for piece in pieces:
            logits, cache = program(params, piece, lengths, cache)
        return logits

    return Row(
        name="prefill",
        stage="inference",
        run=run,
        weights=lambda: params,
        tokens=B * T,
        formula=prefill_program_flops(cfg, B, CHUNK, T) * chunks,
        dtype=cfg.dtype,
        **cost,
        **_predicted(cfg, B, T, calls=chunks, tokens=CHUNK),
    )


def served_rows(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Iterator[Row]:
    """Yields the rows that prefill a prompt into one of a server's SLOTS, and copy it there from
    the prefix cache.

    tokens (T,) int32, T a multiple of 64.
    """
    (T,) = tokens.shape
    size = SLOT_CHUNK if T % SLOT_CHUNK == 0 else 64
    starts = [np.int32(start) for start in range(0, T, size)]
    pieces = [jnp.asarray(tokens[None, start : start + size]) for start in starts]
    slot = np.int32(SLOTS - 1)
    backend = choose_backend()
    cache = backend.make_segments(cfg, SLOTS, backend.edges(T, size, size), cfg.dtype)
    S = cache.edges[-1]
    prompt_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) // SLOTS * T // S
    chunks = len(pieces)

    def in_turn(program: Callable[..., Any], pieces: list[Any]) -> Callable[[], Any]:
        def run() -> Any:
            nonlocal cache
            for piece, start in zip(pieces, starts):
                cache = program(cache, piece, slot, start)
            return cache

        return run

    prefill_program, cost = compile_program(
        prefill_chunk, (cfg,), params, cache, pieces[0], None, slot, starts[0], calls=chunks
    )

    def read(cache: Any, piece: Any, slot: Any, start: Any) -> Any:
        return prefill_program(params, cache, piece, None, slot, start)[1]

    predicted = inference_memory(cfg, SLOTS, S, tokens=size)
    yield Row(
        name="chunked prefill into a slot",
        stage="inference",
        run=in_turn(read, pieces),
        weights=lambda: params,
        tokens=T,
        formula=_chunk_flops(cfg, size, S) * chunks,
        dtype=cfg.dtype,
        **cost,
        predicted_bytes=predicted.params + predicted.cache + predicted.activations // SLOTS,
        traffic=inference_bytes(cfg, 1, S, tokens=size).total * chunks,
    )

    cached = [read_chunk(cache, slot, start, size) for start in starts]
    whole = np.int32(size)
    write_program, cost = compile_program(
        write_chunk, (), cache, cached[0], slot, starts[0], whole, calls=chunks
    )

    def write(cache: Any, piece: Any, slot: Any, start: Any) -> Any:
        return write_program(cache, piece, slot, start, whole)

    yield Row(
        name="prefix-cache hit",
        stage="inference",
        run=in_turn(write, cached),
        weights=lambda: params,
        tokens=T,
        formula=Flops({}),
        predicted_bytes=predicted.cache + prompt_bytes // chunks,
        traffic=2 * prompt_bytes,
        dtype=cfg.dtype,
        **cost,
    )


def _chunk_flops(cfg: ModelConfig, size: int, positions: int) -> Flops:
    """Returns the operations that prefill a chunk of `size` tokens into a slot of so many positions. It
    attends to every one of them. The last layer ends with its keys and values, and there is no head.
    """
    parts = prefill_flops(cfg, size, attention="full", cached=positions - size).parts
    return Flops(prefilled_parts(cfg, parts))


def decode_row(
    cfg: ModelConfig, params: Any, requests: int, length: int, *, name: str, weights: str | None
) -> Row:
    """Returns the row that decodes STEPS tokens greedily for each of `requests`, after `length`
    cached tokens.

    On a CPU a lone request has MIN_ROWS, as in the engine, here with a cache each. `weights`: the
    type of matrices if not the config's.
    """
    rows = max(requests, MIN_ROWS if ops().pads_lone_row else 1)
    empty = make_cache(cfg, rows, length + STEPS)

    def random_like(x: Any) -> Any:
        return jax.random.normal(jax.random.key(0), x.shape).astype(x.dtype)

    # Random numbers in its places, as other requests leave them.
    cache = jax.tree.map(random_like, empty)
    sampling = jax.device_put(sampling_arrays(SamplingParams(temperature=0.0).per_row(rows)))
    token = jnp.zeros((rows,), jnp.int32)
    capacity = cache.k[0].shape[2]
    program, cost = compile_program(decode_steps, (cfg,), params, token, cache, sampling)

    def run() -> Any:
        nonlocal cache
        fresh = cache._replace(length=jnp.full((rows,), length, jnp.int32))
        tokens, cache = program(params, token, fresh, sampling)
        return tokens

    int16 = int16_activation_matrices(params)
    return Row(
        name=name,
        stage="decode",
        run=run,
        weights=lambda: params,
        tokens=requests * STEPS,
        formula=decode_program_flops(cfg, rows, capacity, int16_activations=int16) * STEPS,
        slots=requests,
        series=weights and f"{weights} weights",
        dtype=weights or cfg.dtype,
        **cost,
        **_predicted(cfg, rows, capacity, calls=STEPS, int8=bool(weights)),
    )


def int16_activation_matrices(params: Any) -> set[str]:
    """Returns the names of the Int8 matrices whose activations are 16 bits wide, multiplied as two
    int8 digits.
    """
    names = set()
    for path, leaf in leaf_paths(params).items():
        if isinstance(leaf, Int8) and leaf.activations == "int16":
            names.add(path.rpartition("/")[2])
    return names


def uncached_decode(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> Any:
    """Returns a call that computes the token after tokens (T,) without a KV cache."""

    def next_token(params: Any, tokens: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = hidden_states(cfg, params, tokens, positions)
        return logits_of(cfg, params, hidden[:, -1:]).argmax(-1)

    rows = jnp.asarray(tokens)[None]
    program = jax.jit(next_token).lower(params, rows).compile()
    return functools.partial(program, params, rows)


def _predicted(
    cfg: ModelConfig, slots: int, length: int, *, calls: int = 1, **options: Any
) -> dict[str, Any]:
    """Returns the fields `predicted_bytes` and `traffic` of a Row; arguments as of
    `inference_memory`, for so many calls.
    """
    return {
        "predicted_bytes": inference_memory(cfg, slots, length, **options).total,
        "traffic": inference_bytes(cfg, slots, length, **options).total * calls,
    }


def by_hand_rows(cfg: ModelConfig, params: Any, batch: Batch) -> list[Row]:
    """Returns the rows of a batch: forward alone, to logits, and a training step: loss, every
    gradient, and AdamW.

    Attention is `full`.
    """
    B, T = batch.tokens.shape
    plain = dataclasses.replace(cfg, dtype="float32", remat="none")
    weights = to_numpy(params)
    tokens = np.asarray(batch.tokens)
    targets = np.asarray(batch.targets)
    mask = np.asarray(batch.mask)
    inference = inference_memory(plain, B, 0, tokens=T, every_logit=True)
    training = training_memory(plain, B, T)
    trained = weights
    first_moments = tree_map(np.zeros_like, weights)
    second_moments = tree_map(np.zeros_like, weights)
    moments = adamw.Moments(np.array(0, np.int32), first_moments, second_moments)
    optimizer = adamw.AdamWConfig(learning_rate=1e-4)

    def step() -> float:
        nonlocal trained, moments
        loss, gradient = by_hand.loss_and_gradient(plain, trained, tokens, targets, mask)
        trained, moments = adamw.step(optimizer, trained, gradient, moments)
        return loss

    def forward() -> Any:
        return by_hand.forward(plain, weights, tokens)

    def row(name: str, run: Callable[[], Any], weights: Callable[[], Any], held: int, **cost: Any) -> Row:
        cost["formula"] *= B * T
        return Row(
            name=f"by hand: {name}",
            stage="by hand",
            run=run,
            weights=weights,
            tokens=B * T,
            peak_bytes=_peak(run, held),
            dtype="float32",
            **cost,
        )

    return [
        row(
            "forward",
            forward,
            lambda: weights,
            inference.params,
            formula=forward_flops(plain, T, attention="full"),
            predicted_bytes=inference.total,
            traffic=inference_bytes(plain, B, 0, tokens=T, every_logit=True).total,
        ),
        row(
            "training step",
            step,
            lambda: trained,
            training.params + training.optimizer,
            formula=train_flops(plain, T, attention="full"),
            predicted_bytes=training.total,
            traffic=train_bytes(plain, B, T).total,
        ),
    ]


def _peak(run: Callable[[], Any], held: int) -> int:
    """Returns the most bytes NumPy holds during a call, with those `held` before it."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] + held
    finally:
        tracemalloc.stop()

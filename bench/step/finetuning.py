"""Times steps that train all, the upper half, or LoRA (also over int8) in turns with a matmul; counts FLOPs and memory.

LoRA is on q and v, on all seven matrices, and on these over an int8 base, whole and row by row. Frozen matrices are stored in
the compute type.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cli import Json, Shape, print_table
from bench.models import load, make_step_inputs, next_token_batch
from bench.timing import describe_noise, measure, ratio
from engine.counting.flops import train_flops
from engine.counting.memory import training_memory
from engine.counting.trainable_paths import all_trainable, bottom_frozen, lora_only
from engine.counting.xla import xla_peak
from engine.device import device_name
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import split
from engine.model.weights.int8 import matmul_rules, quantize
from engine.model.weights.matmul import cast_matrices
from engine.training.lora import init_lora
from engine.training.loss import loss_chunks
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import LORA_COMPILER_OPTIONS, init_state, train_step

MATMUL_SIDE = 2048  # of the square matrices of the ceiling
MATMULS = 24  # a round, to hide the clock and the launch
MATMUL_FLOPS = MATMULS * 2 * MATMUL_SIDE**3
FULL = "everything"  # trains, from float32 weights
COLUMNS = "trainable|numbers|ms a step|over full|FLOPs|tokens/s|of ceiling|optimizer MB|predicted GB|XLA GB"

Step = tuple[Callable[[], Any], dict[str, int]]  # a call of a compiled step, and its counts


def measure_finetuning(
    shapes: Sequence[Shape], model_name: str | None, batch: int, tokens: int, rank: int, rounds: int
) -> Json:  # fmt: skip
    """Measures each shape or, with a name, that model with `batch` rows of `tokens`; returns the document."""
    if model_name:
        model = load(model_name)
        return {"models": [measure_steps(model.name, model.cfg, model.params, batch, tokens, rank, rounds)]}
    documents = []
    for shape in shapes:
        cfg, params, _ = make_step_inputs(shape, "bfloat16")
        documents.append(measure_steps(str(shape), cfg, params, shape.batch, shape.tokens, rank, rounds))
    return {"models": documents}


def measure_steps(name: str, cfg: ModelConfig, params: Any, batch: int, tokens: int, rank: int, rounds: int) -> Json:
    """Times one step of each way to fine-tune a model; prints the table and returns it as JSON.

    Operations are by formula: 2 N forward, 2 N back through the frozen weights, the pairs' own, and the causal half of
    attention.
    """
    steps = _steps(cfg, params, batch, tokens, rank)
    a = jax.random.normal(jax.random.key(0), (MATMUL_SIDE, MATMUL_SIDE), jnp.bfloat16)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.bfloat16))
    calls = {"product": lambda: [multiply(a, a) for _ in range(MATMULS)]} | {way: run for way, (run, _) in steps.items()}
    timings = measure(calls, rounds=rounds, warmups=2)
    product = timings["product"]
    ceiling = MATMUL_FLOPS / product.median / 1e9
    rows, lines = [], []
    for way, (_, step) in steps.items():
        timing = timings[way]
        over = ratio(timing, timings[FULL])
        share = ratio(product.scaled(step["flops"] / MATMUL_FLOPS), timing)
        milliseconds, speed = timing.median * 1e3, batch * tokens / timing.median
        flops = step["flops"] / steps[FULL][1]["flops"]
        lines.append([
            way, f"{step['trainable']:,}", f"{milliseconds:.1f}", str(over), f"{flops:.2f}", f"{speed:,.0f}", str(share),
            f"{step['optimizer_bytes'] / 1e6:.2f}", f"{step['predicted_bytes'] / 1e9:.2f}", f"{step['xla_bytes'] / 1e9:.2f}",
        ])  # fmt: skip
        rows.append({
            "name": way, "ms_per_step": milliseconds, "over_full": over.fields(),
            "flops_over_full": flops, "tokens_per_second": speed, "fraction_of_bf16_ceiling": share.ratio, **step,
        })  # fmt: skip
    title = f"{name}, rank {rank}, {batch} x {tokens} tokens, {device_name()}; the ceiling is {ceiling:,.0f} GFLOP/s"
    print_table(title, COLUMNS.split("|"), lines)
    print(describe_noise(timings))
    return {"model": name, "tokens": tokens, "batch": batch, "rank": rank, "ceiling_gflops": ceiling, "rows": rows}


def _steps(cfg: ModelConfig, params: Any, batch: int, tokens: int, rank: int) -> dict[str, Step]:
    text = np.random.default_rng(0).integers(0, cfg.vocab, (batch, tokens + 1), np.int32)
    data = next_token_batch(text)._replace(segments=jnp.ones((batch, tokens), jnp.int32))
    tx, progress = make_optimizer(OptimizerConfig(learning_rate=1e-3)), jnp.float32(0.5)

    def step(paths: Any, trainable: Any, frozen: Any, *, int8: bool = False, microbatches: int = 1) -> Step:
        rows = batch // microbatches
        predicted = training_memory(
            cfg, rows, tokens, trainable=paths, base="int8" if int8 else "float", microbatches=microbatches,
            loss_chunks=loss_chunks(cfg, rows * tokens, head_is_frozen=bool(paths.adapted)),
        )  # fmt: skip
        state = init_state(tx, jax.tree.map(jnp.copy, trainable))
        lowered: Any = train_step.lower(cfg, tx, state, frozen, data, progress, microbatches=microbatches)
        program = lowered.compile(LORA_COMPILER_OPTIONS if int8 else None)

        def run() -> Any:
            nonlocal state
            state, metrics = program(state, frozen, data, progress)
            return metrics.loss

        return run, {
            "trainable": sum(leaf.size for leaf in jax.tree.leaves(trainable)),
            "flops": train_flops(cfg, tokens, attention="causal", trainable=paths, remat="none").total * batch * tokens,
            "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
            "predicted_bytes": predicted.total, "xla_bytes": xla_peak(program),
        }  # fmt: skip

    frozen, upper = cast_matrices(params, cfg.dtype), bottom_frozen(cfg, max(cfg.layers // 2, 1))
    queries, every = LoraConfig(rank, targets=("q", "v")), LoraConfig(rank)
    pairs = init_lora(cfg, params, jax.random.key(0), every)
    int8 = cast_matrices(quantize(params, matmul_rules(params, "full")), cfg.dtype)
    return {
        FULL: step(all_trainable(cfg), cast_matrices(params, "float32"), {}),
        "upper half": step(upper, split(params, upper.weights)[0], split(frozen, upper.weights)[1]),
        "LoRA q,v": step(lora_only(cfg, queries), init_lora(cfg, params, jax.random.key(0), queries), frozen),
        "LoRA all": step(lora_only(cfg, every), pairs, frozen),
        "LoRA all, int8": step(lora_only(cfg, every), pairs, int8, int8=True),
        "LoRA all, int8, by rows": step(lora_only(cfg, every), pairs, int8, int8=True, microbatches=batch),
    }

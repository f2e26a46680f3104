"""Fine-tuning steps beside a full one: of a shape with random weights, and of a real model over two kinds of base."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bench.models import load
from bench.shape import Shape
from bench.timing import measure, noise, ratio
from bench.training_step import make_step, make_work
from engine.counting.flops import train_flops
from engine.counting.memory import training_memory
from engine.counting.trainable import all_trainable, lora_only
from engine.counting.walk import count
from engine.inference.quantize import every_product, quantize
from engine.model.config import LoraConfig, ModelConfig
from engine.model.weights.matmul import cast_matrices
from engine.text.batch import Batch
from engine.training.freeze import select_trainable, split
from engine.training.lora import add_lora
from engine.training.loss import loss_chunks
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import NARROW, init_state, loss_and_gradient, train_step

SIDE = 2048  # of the product that is the ceiling
PRODUCTS = 24  # of them a round, so that the clock and the launch do not count
PRODUCT_FLOPS = PRODUCTS * 2 * SIDE**3
FULL = "none: full"  # everything trains, from float32 weights


def measure_shape(shape: Shape, rank: int, rounds: int) -> dict[str, Any]:
    """Measures the steps of a shape, prints the table and returns the document.

    Four ways to train: everything, the upper half, LoRA on q and v, LoRA on all seven; operations are read from the program.
    """
    work, tx = make_work(shape, "bfloat16"), make_optimizer(OptimizerConfig())
    cfg, params = work.cfg, work.params
    frozen = cast_matrices(params, cfg.dtype)
    upper = select_trainable(cfg, freeze=[f"bottom:{max(cfg.layers // 2, 1)}"]).trainable_paths
    ways: dict[str, tuple[Any, Any]] = {  # trainable and frozen parameters
        "everything": (params, {}),
        "upper half": (split(params, upper)[0], split(frozen, upper)[1]),
    }
    for name, targets in (("LoRA q,v", ("q", "v")), ("LoRA all", ("all",))):
        ways[name] = add_lora(cfg, params, jax.random.key(0), LoraConfig(rank, targets=targets)), frozen
    flops = {
        name: count(lambda t, f, b: loss_and_gradient(cfg, t, f, b), *parts, work.batch).matmul for name, parts in ways.items()
    }
    steps = {name: make_step(cfg, tx, *parts, work.batch) for name, parts in ways.items()}
    timings = measure(steps, rounds=rounds, warmups=2)
    print(f"{shape}, rank {rank}, {jax.devices()[0].device_kind}")
    print(f"{'trainable':>12} {'numbers':>11} {'ms a step':>10} {'time':>12} {'operations':>11} {'optimizer MB':>13}")
    rows = []
    for name, (trainable, _) in ways.items():
        milliseconds, over = timings[name].median * 1e3, ratio(timings[name], timings["everything"])
        numbers = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        moments = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.eval_shape(lambda t: init_state(tx, t).opt_state, trainable)))
        share = flops[name] / flops["everything"]
        print(f"{name:>12} {numbers:11,} {milliseconds:10.1f} {over!s:>12} {share:11.2f} {moments / 1e6:13.2f}")
        rows.append({
            "name": name, "trainable": numbers, "ms_per_step": milliseconds, "over_full": over.value, "spread": over.spread,
            "flops": flops[name], "flops_over_full": share, "optimizer_bytes": moments,
        })  # fmt: skip
    print(noise(timings))
    return {"shape": str(shape), "rank": rank, "rows": rows}


def measure_model(name: str, *, tokens: int, batch: int, rank: int, rounds: int) -> dict[str, Any]:
    """Measures LoRA steps of a model beside a full step and the best product, prints the table and returns the document.

    Operations are those a step needs by formula: 2 N forward, 2 N back through the frozen weights, the pairs' own, and
    attention, of which the causal half is counted. Model and product take turns, and the share is taken in each round.
    """
    model = load(name)
    steps = _model_steps(model.cfg, model.params, tokens, batch, rank)
    timings = measure({"product": _products()} | {name: step.run for name, step in steps.items()}, rounds=rounds, warmups=2)
    product = timings["product"]
    ceiling = PRODUCT_FLOPS / product.median
    print(f"{model.name}, LoRA of rank {rank} on all, {batch} x {tokens} tokens, {jax.devices()[0].device_kind}")
    print(f"A product of {SIDE} takes {ceiling / 1e9:,.0f} GFLOP/s in the same rounds.")
    print(
        f"{'base':>14} {'ms a step':>10} {'over full':>12} {'tokens/s':>9} {'GFLOPs':>7} {'GFLOP/s':>8} {'of ceiling':>12} "
        f"{'predicted GB':>13} {'XLA GB':>7}"
    )
    rows = []
    for name, step in steps.items():
        timing = timings[name]
        over, share = ratio(timing, timings[FULL]), ratio(product.scaled(step.flops / PRODUCT_FLOPS), timing)
        rate, speed = step.flops / timing.median, batch * tokens / timing.median
        print(
            f"{name:>14} {timing.median * 1e3:10.0f} {over!s:>12} {speed:9,.0f} {step.flops / 1e9:7,.0f} {rate / 1e9:8,.0f} "
            f"{share!s:>12} {step.predicted_bytes / 1e9:13.2f} {step.xla_bytes / 1e9:7.2f}"
        )
        rows.append({
            "base": name, "ms_per_step": timing.median * 1e3, "over_full": over.value, "tokens_per_second": speed,
            "flops": step.flops, "fraction_of_bf16_ceiling": share.value, "spread": share.spread,
            "predicted_bytes": step.predicted_bytes, "xla_bytes": step.xla_bytes,
        })  # fmt: skip
    print(noise(timings))
    about = {"model": model.name, "tokens": tokens, "batch": batch, "rank": rank}
    return about | {"ceiling_gflops": ceiling / 1e9, "rows": rows}


@dataclasses.dataclass(frozen=True)
class ModelStep:
    """A call of a compiled step, its operations by formula, and its bytes as predicted and as XLA lays them out."""

    run: Callable[[], Any]
    flops: int
    predicted_bytes: int
    xla_bytes: int


def _model_steps(cfg: ModelConfig, params: Any, tokens: int, batch: int, rank: int) -> dict[str, ModelStep]:
    """Returns the steps by the type that the base is stored in."""
    text = np.random.default_rng(0).integers(0, cfg.vocab, (batch, tokens + 1), np.int32)
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens))
    data = Batch(text[:, :-1], text[:, 1:], np.ones((batch, tokens), bool), positions, np.ones((batch, tokens), np.int32))
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, weight_decay=0.0))

    def step(trainable: Any, base: Any, kind: Literal["float", "int8"], microbatches: int) -> ModelStep:
        rows, paths = batch // microbatches, lora_only(cfg, LoraConfig(rank)) if base else all_trainable(cfg)
        predicted = training_memory(
            cfg, rows, tokens, trainable=paths, base=kind, microbatches=microbatches,
            loss_chunks=loss_chunks(cfg, rows * tokens, head_is_frozen=bool(base)),
        ).total  # fmt: skip
        flops = train_flops(cfg, tokens, attention="causal", trainable=paths, remat="none").total * batch * tokens
        state = init_state(tx, jax.tree.map(jnp.copy, trainable))
        lowered: Any = train_step.lower(cfg, tx, state, base, data, jnp.float32(0), microbatches=microbatches)
        program = lowered.compile(NARROW if kind == "int8" else None)
        laid = program.memory_analysis()
        held = laid.temp_size_in_bytes + laid.argument_size_in_bytes + laid.output_size_in_bytes - laid.alias_size_in_bytes

        def run() -> Any:
            nonlocal state
            state, metrics = program(state, base, data, jnp.float32(0.5))
            return metrics.loss

        return ModelStep(run, flops, predicted, held)

    adapters = add_lora(cfg, params, jax.random.key(0), LoraConfig(rank))
    int8 = cast_matrices(quantize(params, every_product(params, "full")), cfg.dtype)
    return {
        FULL: step(cast_matrices(params, "float32"), {}, "float", 1),
        cfg.dtype: step(adapters, cast_matrices(params, cfg.dtype), "float", 1),
        "int8": step(adapters, int8, "int8", 1),
        "int8, by rows": step(adapters, int8, "int8", batch),
    }


def _products() -> Callable[[], Any]:
    """Returns a call of PRODUCTS products of SIDE in bfloat16."""
    a = jax.random.normal(jax.random.key(0), (SIDE, SIDE), jnp.bfloat16)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.bfloat16))
    return lambda: [multiply(a, a) for _ in range(PRODUCTS)]

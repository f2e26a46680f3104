"""A LoRA step of a real model beside the machine's best product and a full step, over its base as it is and in int8."""

from collections.abc import Callable
from typing import Any, Literal

from bench import models
from bench.timing import Timing, measure, noise, ratio

SIDE = 2048  # of the product that is the ceiling
PRODUCTS = 24  # of them a round, so that the clock and the launch do not count
LEARNING_RATE = 1e-3
FULL = "none: full"  # everything learns, from float32 weights


def adapting(given: str, *, tokens: int, batch: int, rank: int, rounds: int) -> dict[str, Any]:
    """Measures, prints the table and returns the document.

    Operations are those a step needs by formula: 2 N forward, 2 N back through the frozen weights, the pairs' own, and
    attention, of which the causal half is counted. Model and product take turns, and the share is taken in each round.
    """
    import jax

    measured = models.loaded(given)
    cfg = measured.cfg
    steps = _steps(cfg, measured.params, tokens, batch, rank)
    found = measure({"product": _product()} | {name: step.run for name, step in steps.items()}, rounds=rounds, warmups=2)
    product = found.pop("product")
    ceiling = PRODUCTS * 2 * SIDE**3 / product.median
    print(f"{measured.name}, LoRA of rank {rank} on all, {batch} x {tokens} tokens, {jax.devices()[0].device_kind}")
    print(f"A product of {SIDE} takes {ceiling / 1e9:,.0f} GFLOP/s in the same rounds.")
    print(
        f"{'base':>14} {'ms a step':>10} {'over full':>12} {'tokens/s':>9} {'GFLOPs':>7} {'GFLOP/s':>8} {'of ceiling':>12} "
        f"{'predicted GB':>13} {'XLA GB':>7}"
    )
    rows = []
    for name, step in steps.items():
        timing, needed = found[name], step.needed * batch * tokens
        over = ratio(timing, found[FULL])
        share = ratio(_scaled(product, needed / (PRODUCTS * 2 * SIDE**3)), timing)
        rate, speed = needed / timing.median, batch * tokens / timing.median
        print(
            f"{name:>14} {timing.median * 1e3:10.0f} {over!s:>12} {speed:9,.0f} {needed / 1e9:7,.0f} {rate / 1e9:8,.0f} "
            f"{share!s:>12} {step.predicted / 1e9:13.2f} {step.held / 1e9:7.2f}"
        )
        rows.append({
            "base": name, "ms_per_step": timing.median * 1e3, "over_full": over.value, "tokens_per_second": speed,
            "flops": needed, "fraction_of_bf16_ceiling": share.value, "spread": share.spread,
            "predicted_bytes": step.predicted, "xla_bytes": step.held,
        })  # fmt: skip
    print(noise(found | {"product": product}))
    about = {"model": measured.name, "tokens": tokens, "batch": batch, "rank": rank}
    return about | {"ceiling_gflops": ceiling / 1e9, "rows": rows}


def _scaled(timing: Timing, factor: float) -> Timing:
    """What so many times the work would have taken in each round."""
    return Timing(timing.name, tuple(seconds * factor for seconds in timing.seconds))


def _product() -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (SIDE, SIDE), jnp.bfloat16)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.bfloat16))
    return lambda: [multiply(a, a) for _ in range(PRODUCTS)]


class _Step:
    """One way to train: a call of its step, operations a token by formula, bytes as predicted and as XLA lays them out."""

    def __init__(
        self, cfg: Any, frozen: Any, trainable: Any, batch: Any, parts: int, narrow: bool, needed: int, predicted: int
    ) -> None:
        import jax
        import jax.numpy as jnp

        from engine.training.optimizer import OptimizerConfig, make_optimizer
        from engine.training.step import NARROW, init_state, train_step

        tx = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0))
        self.state = init_state(tx, jax.tree.map(jnp.copy, trainable))
        self.program: Any = train_step.lower(cfg, tx, self.state, frozen, batch, jnp.float32(0), microbatches=parts)
        self.program = self.program.compile(NARROW if narrow else None)
        laid = self.program.memory_analysis()
        assert laid is not None
        self.held = laid.temp_size_in_bytes + laid.argument_size_in_bytes + laid.output_size_in_bytes
        self.held -= laid.alias_size_in_bytes
        self.needed, self.predicted = needed, predicted
        self.frozen, self.batch, self.progress = frozen, batch, jnp.float32(0.5)

    def run(self) -> Any:
        self.state, metrics = self.program(self.state, self.frozen, self.batch, self.progress)
        return metrics.loss


def _steps(cfg: Any, params: Any, tokens: int, batch: int, rank: int) -> dict[str, _Step]:
    """By what the base is kept in."""
    import jax
    import numpy as np

    from engine.counting.flops import train_flops
    from engine.counting.memory import training_memory
    from engine.counting.trainable import all_trainable, lora_only
    from engine.inference.quantize import every_product, quantize
    from engine.model.config import LoraConfig
    from engine.model.weights.matmul import cast_matrices
    from engine.text.batch import Batch
    from engine.training.lora import add_lora
    from engine.training.loss import loss_chunks

    text = np.random.default_rng(0).integers(0, cfg.vocab, (batch, tokens + 1), np.int32)
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens))
    given = Batch(text[:, :-1], text[:, 1:], np.ones((batch, tokens), bool), positions, np.ones((batch, tokens), np.int32))
    adapters = add_lora(cfg, params, jax.random.key(0), LoraConfig(rank))
    wide = cast_matrices(params, cfg.dtype)
    narrow = cast_matrices(quantize(params, every_product(params, "full")), cfg.dtype)

    def step(trainable: Any, base: Any, kind: Literal["float", "int8"], parts: int) -> _Step:
        rows, trainable_paths = batch // parts, lora_only(cfg, LoraConfig(rank)) if base else all_trainable(cfg)
        predicted = training_memory(
            cfg, rows, tokens, trainable=trainable_paths, base=kind, microbatches=parts,
            loss_chunks=loss_chunks(cfg, rows * tokens, head_is_frozen=bool(base)),
        ).total  # fmt: skip
        needed = train_flops(cfg, tokens, attention="causal", trainable=trainable_paths, remat="none").total
        return _Step(cfg, base, trainable, given, parts, kind == "int8", needed, predicted)

    return {
        FULL: step(cast_matrices(params, "float32"), {}, "float", 1),
        cfg.dtype: step(adapters, wide, "float", 1),
        "int8": step(adapters, narrow, "int8", 1),
        "int8, by rows": step(adapters, narrow, "int8", batch),
    }

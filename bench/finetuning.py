"""What a fine-tuning step costs beside a full one: in time, in operations, in memory for the optimizer.

    python -m bench.finetuning                          6 layers, 512 wide, 256 tokens, batch 8
    python -m bench.finetuning --shape 8x768x256x8      layers x width x tokens x batch
    python -m bench.finetuning --model smollm2-135m-instruct    LoRA of a real model, beside full and the best product

Four ways to train one model, in turns: everything, the upper half, LoRA on q and v, LoRA on all seven. What is frozen
lies in the compute type. The step is the project's own `train_step` with AdamW and clipping; operations are read from
its program. The last line is JSON.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench import steps
from bench.cli import run
from engine.device import start_jax
from engine.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured."""

    shape: str = "6x512x256x8"
    """LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    model: str | None = None
    """A model to adapt in place of a shape: a run folder, a Hugging Face folder, a .gguf file, or a named model."""
    tokens: int = 256
    """Of a row, with --model."""
    batch: int = 2
    """Rows a step, with --model."""
    rank: int = 8
    """Of each LoRA pair."""
    rounds: int = 9
    """Interleaved rounds, at least 3; the median of the ratios within each counts."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train: a step, how many numbers learn, operations of a step, bytes the optimizer holds."""

    step: Callable[[], Any]
    numbers: int
    operations: int
    optimizer_bytes: int


def measured(flags: Flags) -> dict[str, Any]:
    """Measures, prints the table and returns the document."""
    shape = steps.shape(flags.shape)
    if shape is None or flags.rounds < 3:
        raise UserError("a shape is LAYERSxWIDTHxTOKENSxBATCH with a width in 64s, such as 6x512x256x8; rounds >= 3.")
    start_jax()
    if flags.model:
        from bench.adapting import adapting

        return adapting(flags.model, tokens=flags.tokens, batch=flags.batch, rank=flags.rank, rounds=flags.rounds)
    import jax

    from bench.timing import measure, noise, ratio

    ways = _ways(shape, flags.rank)
    timings = measure({name: way.step for name, way in ways.items()}, rounds=flags.rounds, warmups=2)
    print(f"{shape}, rank {flags.rank}, {jax.devices()[0].device_kind}")
    print(f"{'what learns':>12} {'numbers':>11} {'ms a step':>10} {'time':>12} {'operations':>11} {'optimizer MB':>13}")
    rows = []
    for name, way in ways.items():
        taken, share = timings[name].median * 1e3, ratio(timings[name], timings["everything"])
        work = way.operations / ways["everything"].operations
        print(f"{name:>12} {way.numbers:11,} {taken:10.1f} {share!s:>12} {work:11.2f} {way.optimizer_bytes / 1e6:13.2f}")
        rows.append({
            "name": name, "trainable": way.numbers, "ms_per_step": taken, "over_full": share.value, "spread": share.spread,
            "flops": way.operations, "flops_over_full": work, "optimizer_bytes": way.optimizer_bytes,
        })  # fmt: skip
    print(noise(timings))
    return {"shape": str(shape), "rank": flags.rank, "rows": rows}


def _ways(shape: steps.Shape, rank: int) -> dict[str, Way]:
    """Name -> way, on one draw of weights and random bytes."""
    import jax
    import jax.numpy as jnp

    from engine.counting.walk import count
    from engine.model.config import LoraConfig
    from engine.model.weights.matmul import cast_matrices
    from engine.training.freeze import select_trainable, split
    from engine.training.lora import add_lora
    from engine.training.optimizer import OptimizerConfig, make_optimizer
    from engine.training.step import init_state, loss_and_gradient, train_step

    work, tx = steps.work(shape, "bfloat16"), make_optimizer(OptimizerConfig())
    cfg, params, batch = work.cfg, work.params, work.batch

    def way(trainable: Any, frozen: Any) -> Way:
        held = [init_state(tx, jax.tree.map(jnp.copy, trainable))]  # the step takes its state

        def step() -> Any:
            held[0], metrics = train_step(cfg, tx, held[0], frozen, batch, jnp.float32(0.5))
            return metrics.loss

        operations = count(lambda t, f, b: loss_and_gradient(cfg, t, f, b), trainable, frozen, batch).matmul
        moments = jax.tree.leaves(held[0].opt_state)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        return Way(step, numbers, operations, sum(leaf.nbytes for leaf in moments))

    frozen = cast_matrices(params, cfg.dtype)
    upper = select_trainable(cfg, freeze=[f"bottom:{max(cfg.layers // 2, 1)}"]).trainable_paths
    adapters = {
        name: add_lora(cfg, params, jax.random.key(0), LoraConfig(rank, targets=targets))
        for name, targets in (("LoRA q,v", ("q", "v")), ("LoRA all", ("all",)))
    }
    return {
        "everything": way(params, {}),
        "upper half": way(split(params, upper)[0], split(frozen, upper)[1]),
        **{name: way(tree, frozen) for name, tree in adapters.items()},
    }


def main(args: Sequence[str] | None = None) -> int:
    return run("bench.finetuning", __doc__, Flags, measured, args)


if __name__ == "__main__":
    sys.exit(main())

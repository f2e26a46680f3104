"""What a fine-tuning step costs beside a full one: in time, in operations, in memory for the optimizer.

    python -m bench.finetuning                          6 layers, 512 wide, 256 tokens, batch 8
    python -m bench.finetuning --shape 6x512x256x16     layers x width x tokens x batch

Four ways to train one model, in turns: everything, the upper half, LoRA on q and v, LoRA on all seven. What is frozen
lies in the compute type. The step is the project's own `train_step` with AdamW and clipping. Operations are those of the
formula in `engine.counting.flops`. The last line is JSON.
"""

import dataclasses
import json
import sys

import tyro


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured."""

    shape: str = "6x512x256x8"
    """LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    rank: int = 8
    rounds: int = 9
    """Interleaved rounds; the median of the ratios within each counts."""


def main(args: list[str] | None = None) -> int:
    """Measures, prints the table and, last, one line of JSON."""
    flags = tyro.cli(Flags, prog="python -m bench.finetuning", description=__doc__, args=args)
    sizes = flags.shape.split("x")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes) or int(sizes[1]) % 64:
        print("error: a shape is LAYERSxWIDTHxTOKENSxBATCH with a width in 64s, such as 6x512x256x8.", file=sys.stderr)
        return 2
    from engine.allocator import keep_freed_memory

    keep_freed_memory()
    import jax

    from bench.timing import measure, noise, ratio
    from engine.counting.programs import gradient_program

    layers, width, tokens, batch = map(int, sizes)
    cfg, ways = _ways(layers, width, tokens, batch, flags.rank)
    timings = measure({name: way.run for name, way in ways.items()}, rounds=flags.rounds, warmups=2)
    print(f"{flags.shape}, rank {flags.rank}, {jax.devices()[0].device_kind}")
    print(f"{'trained':>14} {'numbers':>11} {'ms a step':>10} {'time':>12} {'operations':>11} {'optimizer MB':>13}")
    operations = {name: gradient_program(cfg, batch, tokens, trained=way.trained).total for name, way in ways.items()}
    rows = []
    for name, way in ways.items():
        share = ratio(timings[name], timings["full"])
        work = operations[name] / operations["full"]
        print(
            f"{name:>14} {way.numbers:11,} {timings[name].median * 1e3:10.1f} {share!s:>12} {work:11.2f}"
            f" {way.optimizer_bytes / 1e6:13.2f}"
        )
        rows.append({
            "name": name, "trainable": way.numbers, "ms_per_step": timings[name].median * 1e3, "over_full": share.value,
            "spread": share.spread, "flops_over_full": work, "optimizer_bytes": way.optimizer_bytes,
        })  # fmt: skip
    print(noise(timings))
    print(json.dumps({"layers": layers, "width": width, "seq": tokens, "batch": batch, "rank": flags.rank, "rows": rows}))
    return 0


@dataclasses.dataclass(frozen=True)
class _Way:
    run: object
    trained: object
    numbers: int
    optimizer_bytes: int


def _ways(layers: int, width: int, tokens: int, batch: int, rank: int):
    """The config, and {name: way to train it} on random bytes."""
    import jax
    import jax.numpy as jnp

    from engine.counting.trained import everything, lora
    from engine.model.config import ModelConfig
    from engine.model.leaves import cast_matrices
    from engine.model.transformer import init_params
    from engine.text.batch import Batch
    from engine.training.freeze import choose, split
    from engine.training.lora import add_lora, lora_targets
    from engine.training.optimizer import OptimizerConfig, make_optimizer
    from engine.training.step import init_state, train_step

    ff = -(-width * 8 // 3 // 64) * 64
    cfg = ModelConfig(vocab=257, width=width, layers=layers, heads=width // 64, ff=ff, context=tokens, qk_norm=True)
    tx = make_optimizer(OptimizerConfig())
    text = jax.random.randint(jax.random.key(1), (batch, tokens + 1), 0, cfg.vocab)
    positions = jnp.tile(jnp.arange(tokens), (batch, 1))
    data = Batch(text[:, :-1], text[:, 1:], jnp.ones((batch, tokens), bool), positions, None)
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))

    def way(trained, trainable, frozen):
        held = [init_state(tx, jax.tree.map(jnp.array, trainable))]
        numbers = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(held[0].opt_state))

        def run():
            held[0], metrics = train_step(cfg, tx, held[0], frozen, data, jnp.float32(0.5))
            return metrics.loss

        return _Way(run, trained, numbers, optimizer_bytes)

    frozen = cast_matrices(params, cfg.dtype)
    half = choose(cfg, freeze=[f"bottom:{layers // 2}"]).trained
    ways = {"full": way(everything(cfg), params, {})}
    ways["upper half"] = way(half, split(params, half)[0], split(frozen, half)[1])
    for name, targets in (("LoRA q,v", ("q", "v")), ("LoRA all", ("all",))):
        adapters = add_lora(cfg, params, jax.random.key(2), rank=rank, targets=targets)
        ways[name] = way(lora(cfg, rank, lora_targets(cfg, targets)), adapters, frozen)
    return cfg, ways


if __name__ == "__main__":
    sys.exit(main())

"""How close a training step comes to what this machine can multiply.

    python -m bench.training                          a few shapes, beside the ceilings of the same run
    python -m bench.training --shapes 6x384x256x16    layers x width x tokens x batch
    python -m bench.training --allocator default      without keeping freed memory: what page faults cost

Model FLOPs are 6 N + 12 L D T a token (N: weights that take part in a product, the head included; attention counted as
the full square, whatever is skipped). The step is the project's own `train_step`: bfloat16 products, float32 weights,
clipping, AdamW, and the guard against non-finite steps. The model reads bytes. The last line is JSON.
"""

import dataclasses
import json
import sys
from typing import Literal

import tyro

from bench import steps


@dataclasses.dataclass(frozen=True)
class Flags:
    """What is measured."""

    shapes: tuple[str, ...] = ("4x256x256x16", "6x384x256x16", "6x512x256x16", "8x768x256x8")
    """Each as LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rounds: int = 7
    """Interleaved rounds; the median counts."""
    allocator: Literal["keep", "default"] = "keep"


def main(args: list[str] | None = None) -> int:
    """Measures, prints the table and, last, one line of JSON."""
    flags = tyro.cli(Flags, prog="python -m bench.training", description=__doc__, args=args)
    shapes = [steps.shape(text) for text in flags.shapes]
    if shapes.count(None) or flags.rounds < 1:
        print(
            "error: a shape is LAYERSxWIDTHxTOKENSxBATCH with a width in 64s, such as 6x384x256x16; rounds >= 1.",
            file=sys.stderr,
        )
        return 2
    if flags.allocator == "keep":
        from engine.allocator import keep_freed_memory

        keep_freed_memory()
    from bench.timing import measure, noise
    from engine.counting.flops import step_flops
    from engine.counting.hardware import measure_ceilings
    from engine.counting.params import count_params

    ceiling = measure_ceilings()
    print(f"{ceiling.device}, {ceiling.cores} cores, jax {ceiling.jax}")
    print(f"{'shape':>16} {'params':>9} {'ms a step':>10} {'GFLOP/s':>9} {'of ceiling':>11} {'tokens/s':>9}", flush=True)
    rows, timings = [], {}
    for shape in filter(None, shapes):
        layers, width, tokens, batch = shape
        print(f"measuring {shape} ...", file=sys.stderr, flush=True)
        work = steps.work(shape, flags.dtype)
        cfg, run = work.cfg, steps.stepper(work, flags.optimizer)
        timing = measure({"step": run}, rounds=flags.rounds, warmups=2)["step"]
        # The ceiling again beside each shape: on a shared machine it moves, and the best of all counts for all.
        again = measure_ceilings()
        rates = {
            name: max(getattr(ceiling, name), getattr(again, name)) for name in ("bf16_gflops", "f32_gflops", "int8_gflops")
        }
        ceiling = dataclasses.replace(ceiling, **rates)
        name = str(shape)
        timings[name] = timing
        rows.append((name, cfg, layers, width, tokens, batch, timing.median, step_flops(cfg, batch, tokens)))
    top = ceiling.bf16_gflops if flags.dtype == "bfloat16" else ceiling.f32_gflops
    found = []
    for name, cfg, layers, width, tokens, batch, seconds, flops in rows:
        rate = flops / seconds / 1e9
        params = count_params(cfg).total
        speed = batch * tokens / seconds
        print(f"{name:>16} {params / 1e6:8.2f}M {seconds * 1e3:10.1f} {rate:9.0f} {rate / top:11.2f} {speed:9.0f}")
        found.append({
            "layers": layers, "width": width, "seq": tokens, "batch": batch, "ms_per_step": seconds * 1e3,
            "gflops": rate, f"fraction_of_{'bf16' if flags.dtype == 'bfloat16' else 'f32'}_ceiling": rate / top,
        })  # fmt: skip
    both = {"bf16": ceiling.bf16_gflops, "f32": ceiling.f32_gflops, "int8": ceiling.int8_gflops}
    print("ceilings, matmul 2048, GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in both.items()))
    print(noise(timings))
    print(json.dumps({"ceiling_gflops": both, "shapes": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

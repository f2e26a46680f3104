"""Measures how close a training step comes to this machine's fastest matmul, and what Muon adds to it.

    python -m bench.training                        a few shapes, beside the ceilings of the same run
    python -m bench.training --shapes 6x384x256x16  layers x width x tokens x batch
    python -m bench.training --allocator default    without keeping freed memory: the cost of page faults

Model FLOPs are 6 N + 12 L D T a token (N: weights of products, the head included; attention as the full square, whatever is
skipped). The step is `train_step`: bfloat16 products, float32 weights, clipping, AdamW, and the guard against non-finite
steps. Muon's is timed in turns with it, over it. The model reads bytes.
"""

import dataclasses
import sys
from typing import Literal

from bench.cli import Json, check_rounds, parse_shape, progress, run_bench
from engine.device import start_jax


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    shapes: tuple[str, ...] = ("4x256x256x16", "6x384x256x16", "6x512x256x16", "8x768x256x8")
    """Each as LAYERSxWIDTHxTOKENSxBATCH; heads are 64 wide."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rounds: int = 9
    """Interleaved rounds; the median counts."""
    allocator: Literal["keep", "default"] = "keep"


def measure_training(flags: TrainingFlags) -> Json:
    shapes = [parse_shape("a shape of --shapes", text) for text in flags.shapes]
    check_rounds(flags.rounds, 1)
    if flags.allocator == "keep":
        start_jax()  # without it JAX starts by itself, with glibc's own settings
    from bench.models import make_step, make_step_inputs
    from bench.timing import describe_noise, measure, ratio
    from engine.counting.flops import step_flops
    from engine.counting.hardware import best_ceilings, measure_ceilings
    from engine.counting.params import count_params
    from engine.training.optimizer import OptimizerConfig, make_optimizer

    progress("measuring this machine's ceilings ...")
    ceilings = measure_ceilings()
    print(f"{ceilings.device}, {ceilings.cores} cores, jax {ceilings.jax}")
    print(f"{'shape':>16} {'params':>9} {'ms a step':>10} {'GFLOP/s':>9} {'of ceiling':>11} {'tokens/s':>9} {'Muon':>12}")
    measured = []
    for shape in shapes:
        progress(f"measuring {shape}, and the ceilings again beside it: the best of all counts ...")
        inputs = make_step_inputs(shape, flags.dtype)
        steps = {
            f"{shape}, {optimizer.kind}": make_step(inputs, make_optimizer(optimizer))
            for optimizer in (OptimizerConfig(kind="adamw"), OptimizerConfig(kind="muon"))
        }
        measured.append((shape, inputs.cfg, list(measure(steps, rounds=flags.rounds, warmups=2).values())))
        # They move on a shared machine.
        ceilings = best_ceilings(ceilings, measure_ceilings())
    kind, top = ("bf16", ceilings.bf16_gflops) if flags.dtype == "bfloat16" else ("f32", ceilings.f32_gflops)
    rows = []
    for shape, cfg, (timing, muon) in measured:
        seconds, over = timing.median, ratio(muon, timing)
        rate = step_flops(cfg, shape.batch, shape.tokens) / seconds / 1e9
        print(
            f"{shape!s:>16} {count_params(cfg).total / 1e6:8.2f}M {seconds * 1e3:10.1f} {rate:9.0f} {rate / top:11.2f} "
            f"{shape.batch * shape.tokens / seconds:9.0f} {over!s:>12}"
        )
        rows.append({
            "layers": shape.layers, "width": shape.width, "seq": shape.tokens, "batch": shape.batch,
            "ms_per_step": seconds * 1e3, "gflops": rate, f"fraction_of_{kind}_ceiling": rate / top,
            "muon_over_adamw": over.fields(),
        })  # fmt: skip
    rates = {"bf16": ceilings.bf16_gflops, "f32": ceilings.f32_gflops, "int8": ceilings.int8_gflops}
    print("ceilings, matmul 2048, GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    print(describe_noise({timing.name: timing for _, _, timings in measured for timing in timings}))
    return {"ceiling_gflops": rates, "shapes": rows}


if __name__ == "__main__":
    sys.exit(run_bench("bench.training", __doc__, TrainingFlags, measure_training))

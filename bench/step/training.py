"""Times training steps of some shapes beside the machine's ceilings, and Muon's in turns with AdamW's.

Model FLOPs are 6 N + 12 L D T a token (N: weights of products, the head included; attention as the full square, whatever is
skipped).
"""

from collections.abc import Sequence
from typing import Literal

from bench.cli import Json, Shape, print_table, progress
from bench.models import make_step, make_step_inputs
from bench.timing import describe_noise, measure, ratio
from engine.counting.flops import step_flops
from engine.counting.hardware import best_ceilings, measure_ceilings
from engine.counting.params import count_params
from engine.training.optimizer import OptimizerConfig, make_optimizer

COLUMNS = "shape|params|ms a step|GFLOP/s|of ceiling|tokens/s|Muon over AdamW"


def measure_training(shapes: Sequence[Shape], dtype: Literal["bfloat16", "float32"], rounds: int) -> Json:
    """Times each shape's step with AdamW and with Muon; prints the table and returns the document."""
    progress("measuring this machine's ceilings ...")
    ceilings = measure_ceilings()
    measured = []
    for shape in shapes:
        progress(f"measuring {shape}, and the ceilings again beside it: the best of all counts ...")
        inputs = make_step_inputs(shape, dtype)
        steps = {
            f"{shape}, {optimizer.kind}": make_step(inputs, make_optimizer(optimizer))
            for optimizer in (OptimizerConfig(kind="adamw"), OptimizerConfig(kind="muon"))
        }
        measured.append((shape, inputs.cfg, measure(steps, rounds=rounds, warmups=2)))
        # They move on a shared machine.
        ceilings = best_ceilings(ceilings, measure_ceilings())
    kind, top = ("bf16", ceilings.bf16_gflops) if dtype == "bfloat16" else ("f32", ceilings.f32_gflops)
    rows, lines = [], []
    for shape, cfg, timings in measured:
        adamw, muon = timings.values()
        seconds, over = adamw.median, ratio(muon, adamw)
        rate = step_flops(cfg, shape.batch, shape.tokens) / seconds / 1e9
        lines.append([
            str(shape), f"{count_params(cfg).total / 1e6:.2f}M", f"{seconds * 1e3:.1f}", f"{rate:.0f}", f"{rate / top:.2f}",
            f"{shape.batch * shape.tokens / seconds:.0f}", str(over),
        ])  # fmt: skip
        rows.append({
            "shape": str(shape), "layers": shape.layers, "width": shape.width, "seq": shape.tokens, "batch": shape.batch,
            "ms_per_step": seconds * 1e3, "gflops": rate, f"fraction_of_{kind}_ceiling": rate / top,
            "muon_over_adamw": over.fields(),
        })  # fmt: skip
    rates = {"bf16": ceilings.bf16_gflops, "f32": ceilings.f32_gflops, "int8": ceilings.int8_gflops}
    print_table(f"{ceilings.device}, {ceilings.cores} cores, jax {ceilings.jax}", COLUMNS.split("|"), lines)
    print("ceilings, matmul 2048, GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    print(describe_noise({name: timing for _, _, timings in measured for name, timing in timings.items()}))
    return {"ceiling_gflops": rates, "shapes": rows}

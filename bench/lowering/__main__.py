"""Lowers every program for CUDA, ROCm and TPU, which need not be here, and lists kernels and the largest temporary of each.

    python -m bench.lowering                                     at small sizes, in a minute
    python -m bench.lowering --preset smollm2-135m --platform tpu
    python -m bench.lowering --only "train step"                 the programs whose name has these words
    python -m bench.lowering --mesh tensor=2 --only prefill      on a mesh, whose kernels see their device's rows and heads

A temporary is the result of an operation before the compiler fuses any. Where JAX has found cuDNN, its
kernels show for CUDA, and ROCm cannot be lowered for; elsewhere attention in blocks shows for both.
"""

import contextlib
import dataclasses
import os
import sys
from typing import Annotated, Literal

import tyro

from bench.cli import Json, print_table, progress, run_bench
from engine.device import start_jax
from engine.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoweringFlags:
    preset: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: two layers of width 96)")] = None
    """The architecture; nothing is allocated, so any size will do."""
    platform: tuple[Literal["cuda", "rocm", "tpu"], ...] = ("cuda", "rocm", "tpu")
    """The platforms to lower for."""
    only: str = ""
    """Words in the names of the programs."""
    mesh: str = "data=1"
    """The devices of a mesh along its axes, such as fsdp=2,tensor=2. Around a kernel shapes are of one device, else of all."""


def measure_lowering(flags: LoweringFlags) -> Json:
    """Lowers the programs, prints the table and returns the document. Raises UserError where no program has that name."""
    from engine.mesh_shape import check_mesh, parse_mesh

    shape = parse_mesh(flags.mesh)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={shape.devices}"
    start_jax()
    import jax

    from bench.lowering.exported import aliased_arguments, export, kernels, largest_temporary, make_for
    from bench.lowering.programs import INFERENCE, PAIRED, PROGRAMS, QWEN3, B, lay_out, weights_of
    from engine.model.config import preset
    from engine.placement import make_mesh

    cfg = preset(flags.preset) if flags.preset else PAIRED if shape.tensor > 1 else QWEN3
    check_mesh(shape, cfg, B, 2)
    mesh = make_mesh(shape, jax.devices("cpu")) if shape.devices > 1 else None
    programs = {name: make for name, make in PROGRAMS.items() if flags.only in name}
    if not programs:
        raise UserError(f"No program's name has {flags.only!r} in it. Known: {'; '.join(PROGRAMS)}.")
    rows, cells = [], []
    for name, make in programs.items():
        for platform in flags.platform:
            progress(f"lowering {name} for {platform}", replace=True)
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                program = make_for(platform, make, cfg)
                function, arguments, _ = lay_out(program, mesh) if mesh else program
                exported = export(function, arguments, platform)
            called, largest = kernels(exported), largest_temporary(exported)
            aliased = len(aliased_arguments(exported) & weights_of(arguments)) if name in INFERENCE else None
            rows.append({
                "program": name, "platform": platform, "kernels": called, "largest_temporary": largest and str(largest),
                "bytes": largest.bytes if largest else 0, "weights_donated_or_returned": aliased,
            })  # fmt: skip
            listed = ", ".join(f"{count} {kernel}" for kernel, count in called.items())
            cells.append([name, platform, listed or "-", str(largest or "-"), {None: "trains", 0: "none"}.get(aliased, "SOME")])
    heads = ("program", "platform", "kernels", "largest temporary", "weights donated or returned")
    print_table("Every program, lowered", heads, cells, left=3)
    return {"rows": rows}


if __name__ == "__main__":
    sys.exit(run_bench("bench.lowering", __doc__, LoweringFlags, measure_lowering))

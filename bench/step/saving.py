"""Measures how long saving a checkpoint stops training, and how much writing it beside training slows the steps.

    python -m bench.saving                     smollm2-135m, saved as often as a run does by default
    python -m bench.saving --preset nano --interval 10

A round trains steps alone, then steps while a checkpoint is written. Stopped: the seconds of `BackgroundSaver.save`. Slowed:
the steps beside the write, less as many steps alone, by the median. Shares are of the interval between two checkpoints.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.cli import Json, check_rounds, print_table, progress, run_bench
from engine.device import start_jax
from engine.errors import UserError


@dataclasses.dataclass(frozen=True)
class SavingFlags:
    preset: str = "smollm2-135m"
    """The model; its state is weights and both moments of AdamW, in float32."""
    interval: float = 60.0
    """Seconds between checkpoints."""
    batch: int = 2
    context: int = 128
    steps: int = 4
    """Steps alone in a round."""
    rounds: int = 3


def measure_saving(flags: SavingFlags) -> Json:
    """Measures rounds of steps and background saves; prints the table and returns the document."""
    check_rounds(flags.rounds, 1)
    if min(flags.interval, flags.batch, flags.context, flags.steps) <= 0:
        raise UserError("--interval, --batch, --context and --steps must be above 0.")
    start_jax()
    import jax
    import jax.numpy as jnp

    from bench.models import PROGRESS, next_token_batch
    from engine.model.config import preset
    from engine.model.transformer import init_params
    from engine.storage.background_save import BackgroundSaver
    from engine.training.optimizer import OptimizerConfig, make_optimizer
    from engine.training.step import init_state, train_step

    cfg, tx = preset(flags.preset), make_optimizer(OptimizerConfig(kind="adamw"))
    state = jax.jit(lambda key: init_state(tx, init_params(cfg, key)))(jax.random.key(0))
    batch = next_token_batch(jax.random.randint(jax.random.key(1), (flags.batch, flags.context + 1), 0, cfg.vocab))
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.trainable, state.opt_state)))

    def step() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = train_step(cfg, tx, state, {}, batch, jnp.float32(PROGRESS))
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    progress(f"{flags.preset}: a state of {state_bytes / 1e9:.2f} GB; compiling a step ...")
    step()
    rows: dict[str, list[float]] = {name: [] for name in ("step", "stopped", "slowed", "written after")}
    with tempfile.TemporaryDirectory(dir=".") as folder, BackgroundSaver(Path(folder), keep=1) as saver:
        saver.reserve(state.trainable, state.opt_state)
        step()
        saver.wait()
        for number in range(flags.rounds):
            progress(f"round {number + 1} of {flags.rounds} ...")
            alone = statistics.median(step() for _ in range(flags.steps))
            begin = time.perf_counter()
            saver.save(number, state.trainable, state.opt_state, {})
            stopped = time.perf_counter() - begin
            beside = []
            while saver.poll():
                beside.append(step())
            written = time.perf_counter() - begin
            for row, value in zip(rows.values(), (alone, stopped, sum(beside) - alone * len(beside), written)):
                row.append(value)
    medians = {name: statistics.median(row) for name, row in rows.items()}
    shares = {name: medians[name] / flags.interval for name in ("stopped", "slowed")}
    print_table(
        f"a state of {state_bytes / 1e9:.2f} GB",
        ("", "seconds", f"of {flags.interval:g} s"),
        [(name, f"{value:.2f}", f"{shares[name]:.1%}" if name in shares else "") for name, value in medians.items()],
    )
    return {
        "preset": flags.preset, "state_bytes": state_bytes, "interval": flags.interval,
        "seconds": medians, "shares_of_interval": shares, "rounds": rows,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_bench("bench.saving", __doc__, SavingFlags, measure_saving))

"""Times how long saving a checkpoint stops training, and how much writing it beside training slows the steps.

A round trains steps alone, and steps while a checkpoint is written. Stopped: the seconds of `BackgroundSaver.save`. Slowed:
the steps beside the write, less as many steps alone. Shares are of the interval between two checkpoints.
"""

import statistics
import tempfile
from pathlib import Path

import jax

from bench.cli import Json, print_table, progress
from bench.models import TrainingStep, next_token_batch
from bench.timing import measure, ratio
from engine.counting.hardware import clock
from engine.model.config import preset
from engine.model.transformer import init_params
from engine.storage.checkpoint import BackgroundSaver
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import init_state


def measure_saving(preset_name: str, interval: float, batch: int, context: int, steps: int, rounds: int) -> Json:
    """Measures rounds of steps and background saves; prints the table and returns the document."""
    cfg, tx = preset(preset_name), make_optimizer(OptimizerConfig(kind="adamw"))
    state = jax.jit(lambda key: init_state(tx, init_params(cfg, key)))(jax.random.key(0))
    data = next_token_batch(jax.random.randint(jax.random.key(1), (batch, context + 1), 0, cfg.vocab))
    take_step = TrainingStep(cfg, tx, state, {}, data)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    stopped: list[float] = []
    written: list[float] = []
    counts: list[int] = []  # of steps beside each write

    def step() -> float:
        begin = clock()
        jax.block_until_ready((take_step(), take_step.state))
        return clock() - begin

    def alone() -> float:
        return statistics.median(step() for _ in range(steps))

    def beside() -> float:
        """Returns the mean seconds of a step while a checkpoint is written."""
        begin = clock()
        saver.save(len(counts), take_step.state.trainable, take_step.state.opt_state, {})
        stopped.append(clock() - begin)
        seconds = [step()]
        while saver.poll():
            seconds.append(step())
        written.append(clock() - begin)
        counts.append(len(seconds))
        return statistics.mean(seconds)

    progress(f"{preset_name}: a state of {size / 1e9:.2f} GB; compiling a step ...")
    step()
    with tempfile.TemporaryDirectory(dir=".") as folder, BackgroundSaver(Path(folder), keep=1) as saver:
        saver.reserve(take_step.state.trainable, take_step.state.opt_state)
        step()
        saver.wait()
        report = lambda done, total: progress(f"round {done} of {total}")
        timings = measure({"alone": alone, "beside": beside}, rounds=rounds, warmups=0, report=report, seconds_of=float)
    times = list(zip(timings["alone"].seconds, timings["beside"].seconds, counts))
    slowed = [(beside - alone) * count for alone, beside, count in times]
    rows = {"step": [alone for alone, *_ in times], "stopped": stopped, "slowed": slowed, "written after": written}
    medians = {name: statistics.median(row) for name, row in rows.items()}
    shares = {name: medians[name] / interval for name in ("stopped", "slowed")}
    over = ratio(timings["beside"], timings["alone"])
    print_table(
        f"a state of {size / 1e9:.2f} GB",
        ("", "seconds", f"of {interval:g} s"),
        [(name, f"{value:.2f}", f"{shares[name]:.1%}" if name in shares else "") for name, value in medians.items()],
    )
    print(f"a step beside the write takes {over} of a step alone")
    return {
        "preset": preset_name, "state_bytes": size, "interval": interval, "seconds": medians, "shares_of_interval": shares,
        "beside_over_alone": over._asdict(), "rounds": rows,
    }  # fmt: skip

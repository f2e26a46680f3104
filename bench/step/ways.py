"""Times one training step by several methods, interleaved with a square matmul, and a step beside a save.

The methods: AdamW and Muon; training all weights, the upper half, or LoRA (also over int8). Frozen
matrices are stored in the compute type.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bench.machine import Json
from bench.models import BenchModel, StepInputs, TrainingStep, new_state, next_token_batch, tokens_for
from bench.terminal import print_table, progress
from bench.timing import Timing, describe_noise, measure, ratio
from engine.counting.flops import train_flops
from engine.counting.hardware import clock, square_product
from engine.device import device_name
from engine.model.config import LoraConfig, ModelConfig, preset
from engine.model.paths import split
from engine.model.trainable import TrainablePaths, all_trainable, lora_only
from engine.model.transformer import init_params
from engine.model.weights.convert import cast_matrices
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import init_lora
from engine.storage.checkpoint import BackgroundSaver
from engine.text.batch import Batch
from engine.training.freeze import select_trainable
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import LORA_COMPILER_OPTIONS, init_state


class Way(NamedTuple):
    """A step, and what it costs."""

    step: TrainingStep
    flops: int  # 6 N + 12 L D T a token, less the products for gradients that nothing needs


def make_way(
    cfg: ModelConfig,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    paths: TrainablePaths | None = None,
    kind: Literal["adamw", "muon"] = "adamw",
    options: Any = None,
) -> Way:
    """Compiles the step of what is trainable, at `paths`, on a batch. `options`: of the compiler."""
    rows, tokens = batch.tokens.shape
    flops = train_flops(cfg, tokens, attention="full", trainable=paths).total * rows * tokens
    tx = make_optimizer(OptimizerConfig(kind=kind))
    step = TrainingStep(cfg, tx, new_state(tx, trainable), frozen, batch, compiler_options=options)
    return Way(step, flops)


def optimizer_ways(inputs: StepInputs) -> dict[str, Way]:
    make = functools.partial(make_way, inputs.cfg, inputs.params, {}, inputs.batch)
    return {"AdamW": make(), "Muon": make(kind="muon")}


def finetuning_ways(model: BenchModel, rows: int, tokens: int, rank: int) -> dict[str, Way]:
    """Compiles steps of AdamW on `rows` sequences that train all weights, the upper half, and LoRA
    pairs: on q and v, on all seven matrices, and on these over an int8 base.
    """
    cfg = model.cfg
    params = model.params
    batch = next_token_batch(tokens_for(model, rows, tokens + 1))
    data = batch._replace(segments=jnp.ones((rows, tokens), jnp.int32))

    def make(trainable: Any, frozen: Any, paths: TrainablePaths, **options: Any) -> Way:
        return make_way(cfg, trainable, frozen, data, paths, **options)

    frozen = cast_matrices(params, cfg.dtype)
    upper, _ = select_trainable(cfg, freeze=[f"bottom:{max(cfg.layers // 2, 1)}"])
    queries = LoraConfig(rank, targets=("q", "v"))
    every = LoraConfig(rank)
    pairs = functools.partial(init_lora, cfg, jax.random.key(0))
    int8 = cast_matrices(quantize(params, "full"), cfg.dtype)
    upper_half, _ = split(params, upper.weights)
    _, lower_half = split(frozen, upper.weights)
    return {
        "everything": make(cast_matrices(params, "float32"), {}, all_trainable(cfg)),
        "upper half": make(upper_half, lower_half, upper),
        "LoRA q,v": make(pairs(queries), frozen, lora_only(cfg, queries)),
        "LoRA all": make(pairs(every), frozen, lora_only(cfg, every)),
        "LoRA all, int8": make(pairs(every), int8, lora_only(cfg, every), options=LORA_COMPILER_OPTIONS),
    }


def measure_ways(name: str, ways: Mapping[str, Way], tokens: int, dtype: str, rounds: int) -> Json:
    """Times the steps, each of `tokens`, interleaved with products in `dtype`; prints the table and
    returns it as JSON.
    """
    progress(f"measuring {name} ...")
    multiply, product_flops = square_product(dtype)
    calls = {"product": multiply} | {way: each.step for way, each in ways.items()}
    timings = measure(calls, rounds=rounds, warmups=2)
    first = next(iter(ways))
    ceiling = product_flops / timings["product"].median / 1e9
    rows = []
    lines = []
    for way, (step, flops) in ways.items():
        seconds = timings[way].median
        over = ratio(timings[way], timings[first])
        share = ratio(timings["product"].scaled(flops / product_flops), timings[way])
        trainable = sum(leaf.size for leaf in jax.tree.leaves(step.state.trainable))
        row = {
            "name": way,
            "ms_per_step": seconds * 1e3,
            "over_first": over._asdict(),
            "flops_over_first": flops / ways[first].flops,
            "tokens_per_second": tokens / seconds,
            "gflops": flops / seconds / 1e9,
            "of_matmul": share._asdict(),
            "trainable": trainable,
        }
        rows.append(row)
        lines.append(
            [
                way,
                f"{trainable:,}",
                f"{1e3 * seconds:.1f}",
                "" if way == first else str(over),
                f"{row['flops_over_first']:.2f}",
                f"{tokens / seconds:,.0f}",
                f"{row['gflops']:,.0f}",
                str(share),
            ]
        )
    title = f"{name}, {device_name()}; the matmul makes {ceiling:,.0f} GFLOP/s in {dtype}"
    columns = ("a step of", "trainable", "ms", "over the first", "FLOPs", "tokens/s", "GFLOP/s", "of matmul")
    print_table(title, columns, lines)
    print(describe_noise(timings))
    return {"shape": name, "dtype": dtype, "ceiling_gflops": ceiling, "rows": rows}


class _Save(NamedTuple):
    """One checkpoint that was written while steps were trained."""

    stopped: float  # seconds of `BackgroundSaver.save`, during which no step runs
    written_after: float  # seconds from the call of `save` to the end of the write
    steps: int  # trained beside the write


class _TimedTrainer:
    """Times training steps alone, and beside the write of a checkpoint; `saves` has an entry for each
    call of `beside`.
    """

    def __init__(self, take_step: TrainingStep, steps: int) -> None:
        self.take_step = take_step
        self.steps = steps  # in a round alone
        self.saves: list[_Save] = []

    def step(self) -> float:
        """Trains one step and returns its seconds."""
        begin = clock()
        loss = self.take_step()
        # Read after the call, which replaces the state.
        state = self.take_step.state
        jax.block_until_ready((loss, state))
        return clock() - begin

    def alone(self) -> float:
        """Returns the seconds of a step: the median, which a disturbed step does not move."""
        return statistics.median(self.step() for _ in range(self.steps))

    def beside(self, saver: BackgroundSaver) -> float:
        """Writes a checkpoint, trains until it is written, and returns the seconds of a step.

        They are the mean, for a write slows some steps and not others, and the mean times the number
        of steps is the time that all of them took.
        """
        begin = clock()
        saver.save(len(self.saves), self.take_step.state.trainable, self.take_step.state.opt_state, {})
        stopped = clock() - begin
        seconds = [self.step()]
        while saver.poll():
            seconds.append(self.step())
        self.saves.append(_Save(stopped, clock() - begin, len(seconds)))
        return statistics.mean(seconds)


def measure_saving(
    preset_name: str, interval: float, batch: int, context: int, steps: int, rounds: int
) -> Json:
    """Measures how long saving a checkpoint stops training, and how much its write slows the steps
    beside it; prints the table.

    A round trains steps alone, and steps while a checkpoint is written. Stopped: the seconds of
    `BackgroundSaver.save`. Slowed: the steps beside the write, less as many steps alone. Shares are
    of the interval between two checkpoints.
    """
    cfg = preset(preset_name)
    tx = make_optimizer(OptimizerConfig(kind="adamw"))
    state = jax.jit(lambda key: init_state(tx, init_params(cfg, key)))(jax.random.key(0))
    data = next_token_batch(jax.random.randint(jax.random.key(1), (batch, context + 1), 0, cfg.vocab))
    take_step = TrainingStep(cfg, tx, state, {}, data)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    trainer = _TimedTrainer(take_step, steps)

    def report(done: int, total: int) -> None:
        progress(f"round {done} of {total}")

    progress(f"{preset_name}: a state of {size / 1e9:.2f} GB; compiling a step ...")
    trainer.step()
    with tempfile.TemporaryDirectory(dir=".") as folder, BackgroundSaver(Path(folder), keep=1) as saver:
        saver.reserve(take_step.state.trainable, take_step.state.opt_state)
        trainer.step()
        saver.wait()
        calls: dict[str, Callable[[], Any]] = {
            "alone": trainer.alone,
            "beside": functools.partial(trainer.beside, saver),
        }
        # Without warm-ups each round calls `beside` once: the saves are in the order of the rounds.
        timings = measure(calls, rounds=rounds, warmups=0, report=report, seconds_of=float)
    return _report_saving(preset_name, size, interval, timings, trainer.saves)


def _report_saving(
    preset_name: str, size: int, interval: float, timings: Mapping[str, Timing], saves: Sequence[_Save]
) -> Json:
    """Prints the table of `measure_saving` and returns it as JSON. `size`: of the state, in bytes;
    `timings`: of a step alone and of one beside a write, a round for each of the saves.
    """
    seconds_alone = timings["alone"].seconds
    seconds_beside = timings["beside"].seconds
    slowed = []  # seconds of all steps beside a write, less those of as many typical steps alone
    for slow, fast, save in zip(seconds_beside, seconds_alone, saves, strict=True):
        slowed.append((slow - fast) * save.steps)
    rows = {
        "step": list(seconds_alone),
        "stopped": [save.stopped for save in saves],
        "slowed": slowed,
        "written after": [save.written_after for save in saves],
    }
    medians = {name: statistics.median(row) for name, row in rows.items()}
    shares = {name: medians[name] / interval for name in ("stopped", "slowed")}
    over = ratio(timings["beside"], timings["alone"])
    lines = []
    for name, value in medians.items():
        share = f"{shares[name]:.1%}" if name in shares else ""
        lines.append((name, f"{value:.2f}", share))
    print_table(f"a state of {size / 1e9:.2f} GB", ("", "seconds", f"of {interval:g} s"), lines)
    print(f"a step beside the write takes {over} of a step alone")
    return {
        "preset": preset_name,
        "state_bytes": size,
        "interval": interval,
        "seconds": medians,
        "shares_of_interval": shares,
        "beside_over_alone": over._asdict(),
        "rounds": rows,
    }

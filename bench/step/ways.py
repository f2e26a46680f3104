"""Times the ways of one training step, interleaved with each other and with a square matmul, and counts their FLOPs and memory.

Ways: AdamW and Muon; all, the upper half, or LoRA (also over int8); one device, and a mesh of virtual devices, which share the
processor's cores, so that a ratio above 1 is what the mesh itself costs. Frozen matrices are stored in the compute type.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.cli import Json, Shape, print_table, progress
from bench.models import BenchModel, StepInputs, TrainingStep, new_state, next_token_batch
from bench.timing import describe_noise, measure, ratio
from engine.counting.flops import train_flops
from engine.counting.hardware import square_product
from engine.counting.memory import training_memory
from engine.counting.params import TrainablePaths, all_trainable, bottom_frozen, lora_only
from engine.counting.xla import xla_peak
from engine.device import device_name
from engine.mesh.layout import global_batch, init_sharded, make_mesh
from engine.mesh.shape import MeshShape, check_mesh
from engine.model.config import LoraConfig, ModelConfig
from engine.model.loss import loss_chunks
from engine.model.paths import split
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import init_lora
from engine.model.weights.matmul import cast_matrices
from engine.text.batch import Batch
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import LORA_COMPILER_OPTIONS

OptimizerKind = Literal["adamw", "muon"]
COLUMNS = "a step of|trainable|ms|over the first|FLOPs|tokens/s|GFLOP/s|of matmul|predicted GB|XLA GB"


class Way(NamedTuple):
    """A step, and what it costs."""

    step: TrainingStep
    flops: int  # 6 N + 12 L D T a token, less the products for gradients that nothing needs
    predicted_bytes: int


def make_way(
    cfg: ModelConfig,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    *,
    kind: OptimizerKind = "adamw",
    paths: TrainablePaths | None = None,
    base: Literal["float", "int8"] = "float",
    microbatches: int = 1,
    on_mesh: bool = False,
) -> Way:
    """Compiles the step of what is trainable, at `paths`, on a batch; `on_mesh`: of the mesh that is set, if one is."""
    rows, tokens = batch.tokens.shape
    part, tx = rows // microbatches, make_optimizer(OptimizerConfig(kind=kind))
    chunks = loss_chunks(cfg, part * tokens, head_is_frozen=bool(paths and paths.adapted))
    memory = training_memory(
        cfg, part, tokens, optimizer=kind, trainable=paths, base=base, microbatches=microbatches, loss_chunks=chunks
    )
    flops = train_flops(cfg, tokens, attention="full", trainable=paths).total * rows * tokens
    begin = lambda: new_state(tx, trainable)
    state = init_sharded(jax.jit(begin)) if on_mesh else begin()
    options = LORA_COMPILER_OPTIONS if base == "int8" else None
    step = TrainingStep(cfg, tx, state, frozen, global_batch(batch), compiler_options=options, microbatches=microbatches)
    return Way(step, flops, memory.total)


def optimizer_ways(inputs: StepInputs) -> dict[str, Way]:
    """Compiles the full step with AdamW and with Muon."""
    kinds: dict[str, OptimizerKind] = {"AdamW": "adamw", "Muon": "muon"}
    return {name: make_way(inputs.cfg, inputs.params, {}, inputs.batch, kind=kind) for name, kind in kinds.items()}


def finetuning_ways(model: BenchModel, rows: int, tokens: int, rank: int) -> dict[str, Way]:
    """Compiles steps of AdamW on `rows` random sequences that train all weights, the upper half, and LoRA pairs: on q and v, on
    all seven matrices, and on these over an int8 base, whole and row by row."""
    cfg, params = model.cfg, model.params
    text = np.random.default_rng(0).integers(0, cfg.vocab, (rows, tokens + 1), np.int32)
    data = next_token_batch(text)._replace(segments=jnp.ones((rows, tokens), jnp.int32))
    make = lambda trainable, frozen, paths, **options: make_way(cfg, trainable, frozen, data, paths=paths, **options)
    frozen, upper = cast_matrices(params, cfg.dtype), bottom_frozen(cfg, max(cfg.layers // 2, 1))
    queries, every = LoraConfig(rank, targets=("q", "v")), LoraConfig(rank)
    pairs = lambda adapter: init_lora(cfg, jax.random.key(0), adapter)
    int8 = cast_matrices(quantize(params, "full"), cfg.dtype)
    return {
        "everything": make(cast_matrices(params, "float32"), {}, all_trainable(cfg)),
        "upper half": make(split(params, upper.weights)[0], split(frozen, upper.weights)[1], upper),
        "LoRA q,v": make(pairs(queries), frozen, lora_only(cfg, queries)),
        "LoRA all": make(pairs(every), frozen, lora_only(cfg, every)),
        "LoRA all, int8": make(pairs(every), int8, lora_only(cfg, every), base="int8"),
        "LoRA all, int8, by rows": make(pairs(every), int8, lora_only(cfg, every), base="int8", microbatches=rows),
    }


def measure_mesh(inputs: StepInputs, shape: Shape, size: MeshShape, rounds: int) -> Json:
    """Measures the step on one device and on a mesh. `stages.train --mesh ... --dry-run` says what the latter exchanges.

    Raises UserError for a mesh that does not fit.
    """
    check_mesh(size, inputs.cfg, shape.batch)
    batch = jax.device_get(inputs.batch)
    make = lambda: make_way(inputs.cfg, inputs.params, {}, batch, on_mesh=True)
    ways = {"one device": make()}
    with jax.set_mesh(make_mesh(size)):
        ways[str(size)] = make()
        document = measure_ways(str(shape), ways, shape.batch * shape.tokens, inputs.cfg.dtype, rounds)
    return document | {"mesh": size._asdict()}


def measure_ways(name: str, ways: Mapping[str, Way], tokens: int, dtype: str, rounds: int) -> Json:
    """Times the steps, each of `tokens`, in turns with products in `dtype`; prints the table and returns it as JSON."""
    progress(f"measuring {name} ...")
    multiply, product_flops = square_product(dtype)
    timings = measure({"product": multiply} | {way: each.step for way, each in ways.items()}, rounds=rounds, warmups=2)
    first, ceiling = next(iter(ways)), product_flops / timings["product"].median / 1e9
    rows, lines = [], []
    for way, (step, flops, _) in ways.items():
        seconds, over = timings[way].median, ratio(timings[way], timings[first])
        share = ratio(timings["product"].scaled(flops / product_flops), timings[way])
        peak, predicted = xla_peak(step.program), ways[way].predicted_bytes
        trainable = sum(leaf.size for leaf in jax.tree.leaves(step.state.trainable))
        rows.append(
            {
                "name": way,
                "ms_per_step": seconds * 1e3,
                "over_first": over._asdict(),
                "flops_over_first": flops / ways[first].flops,
                "tokens_per_second": tokens / seconds,
                "gflops": flops / seconds / 1e9,
                "of_matmul": share._asdict(),
                "trainable": trainable,
                "predicted_bytes": predicted,
                "xla_bytes": peak,
            }
        )
        lines.append(
            [
                way,
                f"{trainable:,}",
                f"{seconds * 1e3:.1f}",
                "" if way == first else str(over),
                f"{rows[-1]['flops_over_first']:.2f}",
                f"{tokens / seconds:,.0f}",
                f"{rows[-1]['gflops']:,.0f}",
                str(share),
                f"{predicted / 1e9:.2f}",
                f"{peak / 1e9:.2f}",
            ]
        )
    print_table(f"{name}, {device_name()}; the matmul makes {ceiling:,.0f} GFLOP/s in {dtype}", COLUMNS.split("|"), lines)
    print(describe_noise(timings))
    return {"shape": name, "dtype": dtype, "ceiling_gflops": ceiling, "rows": rows}

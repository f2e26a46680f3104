"""Training from random weights: each preset's recipe, the plan, what it begins with, and the report."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.stages import Compiled

from engine.allocator import return_freed_memory
from engine.counting.accelerators import Accelerator, find_networked
from engine.counting.hardware import Ceilings, doubt_ceilings
from engine.counting.params import count_params
from engine.device import Device
from engine.errors import UserError
from engine.files import write_text
from engine.format import duration, format_bytes, format_count, quantity
from engine.mesh import processes
from engine.mesh.layout import current_mesh, sharded_shapes
from engine.mesh.shape import ONE_DEVICE, MeshShape, check_mesh
from engine.model.config import ModelConfig, preset
from engine.model.loss import score
from engine.model.paths import unflatten
from engine.model.shapes import leaf_shapes
from engine.model.transformer import init_params
from engine.planning.formulas import UPDATE_BYTES
from engine.processor import processor
from engine.text.batch import TextBatches
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import TrainState, init_state
from stages.cli.console import Console
from stages.runs.batch_steps import BatchSteps, MeshBatches, temporary_bytes
from stages.runs.estimate import find_ceilings, memory_estimate, memory_limit, mesh_ceilings, require_room
from stages.runs.folder import default_folder, recorded_batch
from stages.runs.options import RunOptions
from stages.runs.plan import Recipe, RunPlan
from stages.runs.run import execute
from stages.runs.stage import Finished, LoopState, Prepared, RunReport
from stages.runs.step_program import compile_step
from stages.runs.text_data import TextData, prepare_text
from stages.runs.text_evaluators import bits_per_byte, quick_evaluator, rows_in_memory, score_text
from stages.train.flags import TextFlags, TrainFlags

SECONDS = 180.0  # of a run when nobody asks for a length
SAMPLE = 160  # tokens
SAMPLE_TEMPERATURE = 0.8
# Of the ceiling, for the products of a step. Both are measured with the default run, that of AMX
# before attention was in C: no product of a step comes near what a square one reaches there.
EXPECTED_MFU = 0.63
AMX_MFU = 0.27
DISPATCH = 0.002  # seconds a step

# The hyperparameters of each preset unless flags say otherwise: the only place with such numbers.
_MUON = OptimizerConfig(
    kind="muon",
    learning_rate=0.003,
    matrix_learning_rate=0.02,
    schedule="wsd",
    warmup=0.02,
    decay=0.5,
    weight_decay=0.1,
    clip=1.0,
)
# Measured on the demo alone: `python -m bench.step --of recipes`. Where the embedding is the head
# too, neither factor is meant.
_DEMO = dataclasses.replace(_MUON, embedding_factor=10.0, head_factor=0.5)

RECIPES = {
    "tiny": Recipe("bytes", context=64, batch=8, optimizer=_MUON),
    "demo": Recipe("bpe:2048", context=256, batch=8, optimizer=_DEMO),
    "nano": Recipe("bpe:4096", context=256, batch=16, optimizer=_MUON),
}


def recipe(preset_name: str, vocab: int) -> Recipe:
    """Returns the preset's own recipe, or what suits a large model of a published architecture."""
    if preset_name in RECIPES:
        return RECIPES[preset_name]
    large = dataclasses.replace(_MUON, learning_rate=6e-4, decay=0.2)
    return Recipe(
        f"bpe:{vocab}", context=1024, batch=32, optimizer=large, accumulate=8, scan=True, remat=True
    )


def run(flags: TrainFlags, device: Device) -> int:
    options = RunOptions(
        **dataclasses.asdict(flags.folder),
        stage="train",
        device=device,
        folder=flags.folder.out_dir or default_folder(flags.preset, flags.text.data),
        dry_run=flags.dry_run,
        mesh=flags.mesh.shape(),
    )
    return execute(options, functools.partial(plan_training, flags, options), prepare_training)


def chosen_recipe(
    flags: TrainFlags, backend: str, mesh: MeshShape, resumed_batch: int | None = None
) -> Recipe:
    """Returns the preset's recipe, overridden by flags.

    The batch is `resumed_batch`, which may have begun on another mesh, else the preset's, grown to
    a multiple of the devices that share its rows. Off a CPU layers are always a scan, which
    compiles one layer; on a CPU a small model is a fifth faster without.
    """
    base = recipe(flags.preset, preset(flags.preset).vocab)
    step = flags.step
    grown_batch = -(-base.batch // mesh.row_shards) * mesh.row_shards
    batch = step.batch or resumed_batch or grown_batch
    context = step.context or base.context
    optimizer = dataclasses.asdict(flags.optimizer)
    optimizer["kind"] = optimizer.pop("optimizer")
    chosen = _override(
        base.resize(batch, context, mesh.row_shards),
        tokenizer=flags.text.tokenizer,
        accumulate=step.accumulate,
        scan=base.scan or step.scan or backend != "cpu",
        remat=base.remat or step.remat,
        optimizer=_override(base.optimizer, **optimizer),
    )
    if chosen.batch % chosen.accumulate:
        raise UserError(f"A batch of {chosen.batch} cannot be read in {chosen.accumulate} equal parts.")
    return chosen


def _override(config: Any, **values: Any) -> Any:
    """Returns the config with those of the values that are not None."""
    overrides = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(config, **overrides)


# The plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training will do: the texts, and how they are trained on."""

    plan: RunPlan
    folder: Path
    data: TextData
    batches: TextBatches
    metadata: dict[str, Any]  # of run.json
    has_default_length: bool
    ceilings: Ceilings  # of all devices of the mesh
    plans_mesh: bool  # which need not be here
    accelerator: Accelerator | None  # that a plan of a mesh is for

    @property
    def peak_flops(self) -> float:
        return self.ceilings.peak_flops(self.plan.cfg.dtype)

    def rows(self, console: Console) -> list[tuple[str, str]]:
        rows = training_rows(self)
        if self.plans_mesh:
            from stages.train.mesh_plan import plan_on_mesh

            rows += plan_on_mesh(self.plan, self.accelerator or find_networked("h100"), console)
        return rows

    def print_example(self, console: Console) -> None:
        """Prints nothing: a text is as it is."""


def plan_training(flags: TrainFlags, options: RunOptions, console: Console) -> TrainingPlan:
    """Plans a training, of which only this reads the flags. Raises UserError for flags that do not
    fit the text or the mesh."""
    text = flags.text
    length = flags.length
    mesh = options.mesh or ONE_DEVICE
    resumed_batch = recorded_batch(options.folder, options.overwrite)
    recipe = chosen_recipe(flags, options.device.backend, mesh, resumed_batch)
    data = prepare_text(text.data, text.validation, recipe.tokenizer, console)
    remat = "none"
    if recipe.remat:
        remat = "block"
    cfg: ModelConfig = _override(
        preset(flags.preset),
        vocab=data.tokenizer.vocab,
        context=recipe.context,
        scan=recipe.scan,
        remat=remat,
        dtype=flags.step.dtype,
    )
    seconds = length.max_time
    has_default_length = not length.max_time and not length.steps
    if has_default_length:
        seconds = SECONDS
    plan = RunPlan(
        name=flags.preset,
        cfg=cfg,
        recipe=recipe,
        seed=flags.seed,
        steps=length.steps,
        seconds=seconds,
        mesh=mesh,
    )
    check_mesh(mesh, cfg, recipe.batch, recipe.accumulate)
    return TrainingPlan(
        plan=plan,
        folder=options.folder,
        data=data,
        batches=TextBatches(tokens=data.train.tokens, seq=recipe.context, batch=recipe.batch, seed=plan.seed),
        metadata=training_metadata(plan, text, data),
        has_default_length=has_default_length,
        ceilings=mesh_ceilings(find_ceilings(console), mesh),
        plans_mesh=bool(flags.mesh.mesh and options.dry_run),
        accelerator=flags.accelerator,
    )


def training_metadata(plan: RunPlan, text: TextFlags, data: TextData) -> dict[str, Any]:
    """Returns the stage's own entries of run.json."""
    validation = None
    if text.validation:
        validation = str(text.validation)
    return {
        "preset": plan.name,
        "text": {
            "data": text.data,
            "validation": validation,
            "digest": data.digest,
            "validation_digest": data.validation_digest,
            "bytes": data.train.bytes,
            "tokens": len(data.train.tokens),
        },
        "tokenizer": {"kind": plan.recipe.tokenizer, "digest": data.tokenizer.digest},
    }


def training_rows(planned: TrainingPlan) -> list[tuple[str, str]]:
    """Returns the banner's rows."""
    plan = planned.plan
    data = planned.data
    cfg = plan.cfg
    params = count_params(cfg)
    steps, long = plan.predict(predict_step_seconds(plan, planned.ceilings))
    epochs = steps * plan.step_tokens / (len(data.train.tokens) - 1)
    flops = plan.step_flops / plan.step_tokens
    return [
        ("text", f"{data.name}: {format_bytes(data.train.bytes)}, {len(data.train.tokens):,} tokens"),
        (
            "validation",
            f"{data.validation_name}: {format_bytes(data.validation.bytes)}, "
            f"{len(data.validation.tokens):,} tokens",
        ),
        ("model", f"{plan.name}: {_describe_architecture(cfg)}"),
        ("parameters", f"{params.total:,} ({params.total:,} trainable, 0 frozen)"),
        ("FLOPs", f"{format_count(flops)} a token trained (6N + 12LDT, N = {format_count(params.matmul)})"),
        ("step", _describe_step(plan.recipe)),
        ("memory", _describe_memory(plan)),
        ("length", _describe_length(planned)),
        (
            "predicted",
            f"{quantity(steps, plan.step_name)}, {format_count(epochs)} epochs, "
            f"{long} at {expected_mfu(cfg.dtype):.0%} of this machine's "
            f"{format_count(planned.peak_flops)}FLOP/s in {cfg.dtype}; "
            "again after the first steps",
        ),
    ]


def _describe_architecture(cfg: ModelConfig) -> str:
    heads = f"{cfg.heads} heads"
    if cfg.kv_heads != cfg.heads:
        heads += f" ({cfg.kv_heads} key/value)"
    return f"{cfg.layers} layers, width {cfg.width}, {heads}, {cfg.vocab:,} tokens, {cfg.dtype}"


def _describe_step(recipe: Recipe) -> str:
    batch = f"{recipe.batch} x {recipe.context} tokens"
    if recipe.accumulate > 1:
        batch += f", {recipe.accumulate} parts at a time"
    return f"{batch}, {recipe.optimizer.kind}, {recipe.optimizer.schedule}"


def _describe_memory(plan: RunPlan) -> str:
    phrase = memory_estimate(plan, plan.memory.total)
    if plan.memory.total > memory_limit(plan):
        phrase += "  ** more than there is: smaller --batch, --accumulate or --remat **"
    return phrase


def _describe_length(planned: TrainingPlan) -> str:
    length = planned.plan.length()
    if planned.has_default_length:
        length += ": the default run is time-boxed (--max-time 1h, --steps 5000 change it)"
    return length


def expected_mfu(dtype: str) -> float:
    has_amx = jax.default_backend() == "cpu" and "amx_bf16" in processor().instructions.split()
    if has_amx and dtype == "bfloat16":
        return AMX_MFU
    return EXPECTED_MFU


def predict_step_seconds(plan: RunPlan, best: Ceilings) -> float:
    """Predicts the seconds of a step's products (remat's and Muon's too), the optimizer's traffic,
    and the dispatch."""
    cfg = plan.cfg
    flops = plan.step_flops + plan.step.update_flops
    products = flops / best.peak_flops(cfg.dtype) / expected_mfu(cfg.dtype)
    update = UPDATE_BYTES * count_params(cfg).total / (1e9 * best.update_gbs)
    return products + update + DISPATCH


# What it begins with, and its steps


def prepare_training(planned: TrainingPlan, console: Console) -> "PreparedTraining":
    """Prepares a training, whose weights begin random. Raises UserError when weights, gradients and
    optimizer state alone do not fit."""
    plan = planned.plan
    least = plan.memory.params + plan.memory.gradients + plan.memory.optimizer
    needs = f"Training {plan.name} needs at least"
    require_room(plan, least, needs, "choose a smaller preset.", " for weights, gradients and optimizer")
    optimizer = make_optimizer(plan.recipe.optimizer)

    @jax.jit
    def make_first_state() -> TrainState:
        return init_state(optimizer, init_params(plan.cfg, jax.random.key(plan.seed)))

    return PreparedTraining(
        plan=plan,
        metadata=planned.metadata,
        advice="--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32",
        tokenizer=planned.data.tokenizer,
        stop_token_ids=(planned.data.tokenizer.eos_id,),
        frozen={},
        training=planned,
        make_first_state=make_first_state,
    )


class Compiling(NamedTuple):
    """A step that a thread compiles."""

    program: concurrent.futures.Future[Compiled]
    buffer_bytes: concurrent.futures.Future[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedTraining(Prepared):
    """What a training begins with."""

    training: TrainingPlan
    make_first_state: Any  # a jitted function of nothing; its weights are random

    def rows(self, console: Console) -> list[tuple[str, str]]:
        return self.training.rows(console)

    def initial_state(self, trainable: Any) -> TrainState:
        return self.make_first_state()

    def prompt(self) -> tuple[str, list[int]]:
        text = "\n"
        if self.training.data.name == "shakespeare":
            text = "ROMEO:"
        return text, self.tokenizer.encode(text).tolist()

    def begin_compiling(self, beside_reading: bool) -> Compiling:
        """Compiles in a thread: from shapes, for hashing and reading a checkpoint leave Python to
        it.

        Making a state does not: it waits until the step is traced, and is itself traced beside XLA.
        """
        plan = self.plan
        traced = threading.Event()
        mesh = current_mesh()
        batch = self._batches().at(0)
        state = self._state_shapes()

        def compile_on_mesh() -> Compiled:
            try:
                with contextlib.ExitStack() as stack:
                    if mesh:
                        stack.enter_context(jax.set_mesh(mesh))
                    return compile_step(plan, state, self.frozen, batch, on_traced=traced.set)
            finally:
                traced.set()

        def measure_buffer() -> int:
            return temporary_bytes(program.result())

        thread = concurrent.futures.ThreadPoolExecutor(1)
        program = thread.submit(compile_on_mesh)
        buffer_bytes = thread.submit(measure_buffer)
        if not beside_reading:
            traced.wait()
        return Compiling(program, buffer_bytes)

    def _state_shapes(self) -> Any:
        """Returns the shapes and shardings of a state."""
        params = {}
        for path, shape in leaf_shapes(self.plan.cfg).items():
            params[path] = jax.ShapeDtypeStruct(shape, "float32")
        init = functools.partial(init_state, make_optimizer(self.plan.recipe.optimizer))
        return sharded_shapes(init, unflatten(params))

    def begin_steps(
        self, state: TrainState, loop_state: LoopState, compiling: Compiling, console: Console
    ) -> BatchSteps:
        plan = self.plan
        data = self.training.data
        with console.task("compiling", always=True):
            program = compiling.program.result()
        self.make_first_state.clear_cache()  # its program takes 40 MB and more
        return_freed_memory()  # of compiling and of making the first state
        evaluator = quick_evaluator(plan.cfg, data.validation, data.tokenizer, score)
        return BatchSteps(
            plan=plan,
            program=program,
            buffer_bytes=compiling.buffer_bytes.result(),
            frozen=self.frozen,
            batches=self._batches(),
            evaluator=evaluator,
            first_step=loop_state.step,
            peak_flops=self.training.peak_flops,
        )

    def _batches(self) -> MeshBatches:
        batches = self.training.batches
        return MeshBatches(batches.order, batches.at)

    def report(self, finished: Finished, console: Console) -> RunReport:
        cfg = self.plan.cfg
        data = self.training.data
        params = finished.state.trainable
        with console.task("evaluating on the whole validation text", always=True) as report_progress:
            nats = score_text(
                cfg,
                params,
                data.validation.tokens,
                seq=cfg.context,
                stride=max(1, cfg.context // 2),
                rows=rows_in_memory(cfg, cfg.context),
                report=report_progress,
            )
        text = self._sample(params, console)
        if processes.is_first() and text is not None:
            write_text(self.training.folder / "samples" / f"{finished.loop_state.step}.txt", text)
        return training_report(self.training, finished.loop_state, nats, text)

    def _sample(self, params: Any, console: Console) -> str | None:
        """Returns a sampled text, "" in processes other than 0; None for a model that no device
        holds whole."""
        from engine.inference.decode import generate, prepare_params
        from stages.runs.mesh import fits_one_device, on_one_device

        if not fits_one_device(params):
            return None
        cfg = self.plan.cfg
        count = min(SAMPLE, cfg.context - 1)
        with console.task("writing a sample"), on_one_device(params) as whole:
            if not processes.is_first():
                return ""
            ids = generate(
                cfg,
                params=prepare_params(cfg, whole),
                prompt=self.tokenizer.encode("\n").tolist(),
                count=count,
                temperature=SAMPLE_TEMPERATURE,
                seed=self.plan.seed,
                stop_token_ids=self.stop_token_ids,
            )
        return self.tokenizer.decode(ids)


def training_report(
    training: TrainingPlan, loop_state: LoopState, nats: float, text: str | None
) -> RunReport:
    """Reports the score of the whole validation text, in summed nats, and a sampled text, if there
    is one."""
    plan = training.plan
    data = training.data
    step = loop_state.step
    seconds = loop_state.seconds
    mfu = step * plan.step_flops / seconds / training.peak_flops
    doubt_ceilings(mfu)
    validation = bits_per_byte(nats, data.validation.bytes)
    speed = step * plan.step_tokens / seconds
    result = {
        "val_bits_per_byte": validation,
        "train_seconds": seconds,
        "training_flops": step * plan.step_flops,
        "first_step_seconds": loop_state.first_step_seconds,
        "tokens_per_second": speed,
        "mfu": mfu,
    }
    first = f"first step {duration(loop_state.first_step_seconds or 0)} after the start"
    rows = [
        ("validation", f"{validation:.4f} bits per byte on all of {data.validation_name}"),
        ("text", f"read {training.batches.order.epoch(step):.2f} times"),
        ("speed", f"{speed:,.0f} tokens/s, MFU {mfu:.0%}; {first}"),
    ]
    saved = f"{training.folder}: config.json, run.json, metrics.jsonl, tokenizer, checkpoints, samples"
    if text is None:
        text = "No sample: the model is too large for one device. `generate --mesh tensor=N` writes one."
    return RunReport(result, [("what it writes", text)], rows, saved, ["generate", "evaluate"])

"""Training from random weights: each preset's recipe, the Stage, and its run from flags."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from typing import Any

import jax

from engine.counting.accelerators import find_accelerator
from engine.counting.flops import muon_flops
from engine.counting.hardware import Ceilings, doubt_ceilings
from engine.counting.params import count_params, leaf_shapes
from engine.device import Device, processor, return_freed_memory
from engine.errors import UserError
from engine.files import write_text
from engine.format import duration, format_bytes, format_count, quantity
from engine.mesh import processes
from engine.mesh.layout import current_mesh, sharded_shapes
from engine.mesh.shape import ONE_DEVICE, MeshShape, check_mesh
from engine.model.config import preset
from engine.model.loss import score
from engine.model.paths import unflatten
from engine.model.transformer import init_params
from engine.text.batch import TextBatches
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.step import TrainState, init_state
from stages.cli.console import Console
from stages.runs.estimate import find_ceilings, memory_estimate, memory_limit, mesh_ceilings, require_room
from stages.runs.folder import default_folder, recorded_batch
from stages.runs.plan import Recipe, RunPlan
from stages.runs.run import RunOptions, execute
from stages.runs.stage import BatchStage, LoopState, MeshBatches, RunReport, compile_step, temporary_bytes
from stages.runs.text_data import bits_per_byte, prepare_text, quick_evaluator, rows_in_memory, score_text
from stages.train.flags import TrainFlags

SECONDS = 180.0  # of a run when nobody asks for a length
SAMPLE = 160  # tokens
# Of the ceiling, for the products of a step. Both are measured with the default run, that of AMX before attention was in C:
# no product of a step comes near what a square one reaches there.
EXPECTED_MFU, AMX_MFU = 0.63, 0.27
UPDATE_BYTES = 28  # moved a parameter by the optimizer
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
# Measured on the demo alone: `python -m bench.step --of recipes`. Where the embedding is the head too, neither factor is meant.
_DEMO = dataclasses.replace(_MUON, embedding_factor=10.0, head_factor=0.5)

RECIPES = {
    "tiny": Recipe("bytes", context=64, batch=8, optimizer=_MUON),
    "demo": Recipe("bpe:2048", context=256, batch=8, optimizer=_DEMO),
    "nano": Recipe("bpe:4096", context=256, batch=16, optimizer=_MUON),
}


def recipe(preset: str, vocab: int) -> Recipe:
    """Returns the preset's own recipe, or what suits a large model of a published architecture."""
    large = dataclasses.replace(_MUON, learning_rate=6e-4, decay=0.2)
    return RECIPES.get(preset) or Recipe(
        f"bpe:{vocab}", context=1024, batch=32, optimizer=large, accumulate=8, scan=True, remat=True
    )


def run(flags: TrainFlags, device: Device) -> int:
    folder = flags.folder.out_dir or default_folder(flags.preset, flags.text.data)
    options = RunOptions(
        **dataclasses.asdict(flags.folder),
        stage="train",
        device=device,
        folder=folder,
        dry_run=flags.dry_run,
        mesh=flags.mesh.shape(),
    )
    return execute(options, lambda console: Training(flags, options, console))


def chosen_recipe(flags: TrainFlags, backend: str, mesh: MeshShape, resumed_batch: int | None = None) -> Recipe:
    """Returns the preset's recipe, overridden by flags.

    The batch is `resumed_batch`, which may have begun on another mesh, else the preset's, grown to a multiple of the devices
    that share its rows. Off a CPU layers are always a scan, which compiles one layer; on a CPU a small model is a fifth faster
    without.
    """
    base = recipe(flags.preset, preset(flags.preset).vocab)
    step, optimizer = flags.step, dataclasses.asdict(flags.optimizer)
    batch = step.batch or resumed_batch or -(-base.batch // mesh.row_shards) * mesh.row_shards
    optimizer["kind"] = optimizer.pop("optimizer")
    chosen = _replace(
        base.resize(batch, step.context or base.context, mesh.row_shards),
        tokenizer=flags.text.tokenizer,
        accumulate=step.accumulate,
        scan=step.scan or backend != "cpu" or None,
        remat=step.remat or None,
        optimizer=_replace(base.optimizer, **optimizer),
    )
    if chosen.batch % chosen.accumulate:
        raise UserError(f"A batch of {chosen.batch} cannot be read in {chosen.accumulate} equal parts.")
    return chosen


def _replace(config: Any, **values: Any) -> Any:
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})


class Training(BatchStage):
    """Trains from random weights. Only the constructor reads the flags."""

    advice = "--learning-rate or --matrix-learning-rate, warm up longer with --warmup, or try --dtype float32"

    def __init__(self, flags: TrainFlags, options: RunOptions, console: Console) -> None:
        text, length, mesh = flags.text, flags.length, options.mesh or ONE_DEVICE
        resumed_batch = recorded_batch(options.folder, options.overwrite)
        recipe = chosen_recipe(flags, options.device.backend, mesh, resumed_batch)
        self.folder, self.console, self.frozen = options.folder, console, dict[str, Any]()
        self.data = data = prepare_text(text.data, text.validation, recipe.tokenizer, console)
        cfg = _replace(
            preset(flags.preset),
            vocab=data.tokenizer.vocab,
            context=recipe.context,
            scan=recipe.scan,
            remat="block" if recipe.remat else "none",
            dtype=flags.step.dtype,
        )
        self.default_length = not (length.max_time or length.steps)
        seconds = SECONDS if self.default_length else length.max_time
        self.plan = plan = RunPlan(flags.preset, cfg, recipe, flags.seed, length.steps, seconds, mesh=mesh)
        check_mesh(mesh, cfg, recipe.batch, recipe.accumulate)
        optimizer, key = make_optimizer(recipe.optimizer), lambda: jax.random.key(plan.seed)
        # One object, for JAX traces it only once.
        self.begin: Any = jax.jit(lambda: init_state(optimizer, init_params(cfg, key())))
        self.metadata = {
            "preset": plan.name,
            "text": {
                "data": text.data,
                "validation": str(text.validation) if text.validation else None,
                "digest": data.digest,
                "validation_digest": data.validation_digest,
                "bytes": data.train.bytes,
                "tokens": len(data.train.tokens),
            },
            "tokenizer": {"kind": recipe.tokenizer, "digest": data.tokenizer.digest},
            "recipe": dataclasses.asdict(recipe),
        }
        self.ceilings = mesh_ceilings(find_ceilings(console), mesh)
        self.peak_flops = self.ceilings.peak_flops(cfg.dtype)
        self.plans_mesh = bool(flags.mesh.mesh and options.dry_run)  # which need not be here
        self.accelerator = flags.accelerator
        self.tokenizer, self.stop_token_ids = data.tokenizer, (data.tokenizer.eos_id,)
        self.batches = TextBatches(data.train.tokens, recipe.context, recipe.batch, plan.seed)

    def load_weights(self) -> None:
        """Raises UserError when weights, gradients and optimizer state alone do not fit; weights begin random."""
        plan, (_, fsdp, tensor) = self.plan, self.plan.mesh
        least = count_params(plan.cfg).total * (16 if plan.recipe.optimizer.kind == "adamw" else 12) // (fsdp * tensor)
        require_room(
            plan,
            least,
            f"Training {plan.name} needs at least",
            "choose a smaller preset.",
            " for weights, gradients and optimizer",
        )

    def plan_rows(self) -> list[tuple[str, str]]:
        plan, data, cfg, recipe = self.plan, self.data, self.plan.cfg, self.plan.recipe
        params = count_params(cfg)
        steps, long = plan.predict(predict_step_seconds(plan, self.ceilings))
        epochs = steps * plan.step_tokens / (len(data.train.tokens) - 1)
        heads = f"{cfg.heads} heads" + (f" ({cfg.kv_heads} key/value)" if cfg.kv_heads != cfg.heads else "")
        accumulated = f", {recipe.accumulate} parts at a time" if recipe.accumulate > 1 else ""
        train, validation = (
            f"{format_bytes(text.bytes)}, {len(text.tokens):,} tokens" for text in (data.train, data.validation)
        )
        default = ": the default run is time-boxed (--max-time 1h, --steps 5000 change it)" if self.default_length else ""
        optimizer = f"{recipe.optimizer.kind}, {recipe.optimizer.schedule}"
        needed, too_much = plan.memory.total, "  ** more than there is: smaller --batch, --accumulate or --remat **"
        flops, mesh_rows = plan.step_flops / plan.step_tokens, list[tuple[str, str]]()
        if self.plans_mesh:
            from stages.train.mesh_plan import plan_on_mesh

            mesh_rows = plan_on_mesh(plan, self.accelerator or find_accelerator("h100"), self.console)
        return [
            ("text", f"{data.name}: {train}"),
            ("validation", f"{data.validation_name}: {validation}"),
            ("model", f"{plan.name}: {cfg.layers} layers, width {cfg.width}, {heads}, {cfg.vocab:,} tokens, {cfg.dtype}"),
            ("parameters", f"{params.total:,} ({params.total:,} trainable, 0 frozen)"),
            ("FLOPs", f"{format_count(flops)} a token trained (6N + 12LDT, N = {format_count(params.matmul)})"),
            ("step", f"{recipe.batch} x {recipe.context} tokens{accumulated}, {optimizer}"),
            ("memory", f"{memory_estimate(plan, needed)}{too_much * (needed > memory_limit(plan))}"),
            ("length", f"{plan.length()}{default}"),
            (
                "predicted",
                f"{quantity(steps, plan.step_name)}, {format_count(epochs)} epochs, {long} at {expected_mfu(cfg.dtype):.0%} of "
                f"this machine's {format_count(self.peak_flops)}FLOP/s in {cfg.dtype}; again after the first steps",
            ),
            *mesh_rows,
        ]

    def initial_state(self, trainable: Any) -> TrainState:
        return self.begin()

    def begin_compiling(self, beside_reading: bool) -> None:
        """Compiles in a thread: from shapes, for hashing and reading a checkpoint leave Python to it.

        Making a state does not: it waits until the step is traced, and is itself traced beside XLA.
        """
        plan, traced = self.plan, threading.Event()
        batch, mesh = MeshBatches(self.batches.order, self.batches.at).at(0), current_mesh()
        shapes = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in leaf_shapes(plan.cfg).items()}
        state = sharded_shapes(functools.partial(init_state, make_optimizer(plan.recipe.optimizer)), unflatten(shapes))

        def compile_on_mesh() -> Any:
            try:
                with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                    return compile_step(plan, state, self.frozen, batch, on_traced=traced.set)
            finally:
                traced.set()

        thread = concurrent.futures.ThreadPoolExecutor(1)
        self.compiling = thread.submit(compile_on_mesh)
        self.buffer = thread.submit(lambda: temporary_bytes(self.compiling.result()))
        if not beside_reading:
            traced.wait()

    def prepare_steps(self, state: TrainState, loop_state: LoopState) -> None:
        plan, data = self.plan, self.data
        with self.console.task("compiling", always=True):
            program = self.compiling.result()
        self.begin.clear_cache()  # its program takes 40 MB and more
        return_freed_memory()  # of compiling and of making the first state
        evaluator = quick_evaluator(plan.cfg, data.validation, data.tokenizer, score)
        batches = MeshBatches(self.batches.order, self.batches.at)
        self.begin_steps(program, self.buffer.result(), batches, evaluator, loop_state.step)

    def finish(self, state: TrainState, loop_state: LoopState, warm_rate: float | None, before: Any) -> RunReport:
        plan, cfg, data, params = self.plan, self.plan.cfg, self.data, state.trainable
        step, seconds, folder = loop_state.step, loop_state.seconds, self.folder
        with self.console.task("evaluating on the whole validation text", always=True) as report:
            seq, batch = cfg.context, rows_in_memory(cfg, cfg.context)
            nats = score_text(cfg, params, data.validation.tokens, seq, max(1, seq // 2), batch, report)
        text = self._sample(params)
        if processes.is_first() and text is not None:
            write_text(folder / "samples" / f"{step}.txt", text)
        mfu = step * plan.step_flops / seconds / self.peak_flops
        doubt_ceilings(mfu)
        result = {
            "val_bits_per_byte": bits_per_byte(nats, data.validation.bytes),
            "train_seconds": seconds,
            "first_step_seconds": loop_state.first_step_seconds,
            "tokens_per_second": step * plan.step_tokens / seconds,
            "mfu": mfu,
        }
        first = f"first step {duration(loop_state.first_step_seconds or 0)} after the start"
        rows = [
            ("validation", f"{result['val_bits_per_byte']:.4f} bits per byte on all of {data.validation_name}"),
            ("text", f"read {self.batches.order.epoch(step):.2f} times"),
            ("speed", f"{result['tokens_per_second']:,.0f} tokens/s, MFU {mfu:.0%}; {first}"),
        ]
        saved = f"{folder}: config.json, run.json, metrics.jsonl, tokenizer, checkpoints, samples"
        if text is None:
            text = "No sample: the model is too large for one device. `generate --mesh tensor=N` writes one."
        return RunReport(result, [("what it writes", text)], rows, saved, ["generate", "evaluate"])

    def _sample(self, params: Any) -> str | None:
        """Samples a text in process 0; None for a model that no device holds whole."""
        from engine.inference.decode import generate, prepare_params
        from stages.runs.mesh import fits_one_device, on_one_device

        if not fits_one_device(params):
            return None
        plan, cfg, count = self.plan, self.plan.cfg, min(SAMPLE, self.plan.cfg.context - 1)
        with self.console.task("writing a sample"), on_one_device(params) as whole:
            if not processes.is_first():
                return ""
            prompt, params = self.tokenizer.encode("\n").tolist(), prepare_params(cfg, whole)
            ids = generate(cfg, params, prompt, count, temperature=0.8, seed=plan.seed, stop_token_ids=self.stop_token_ids)
        return self.tokenizer.decode(ids)

    def prompt(self) -> tuple[str, list[int]]:
        text = "ROMEO:" if self.data.name == "shakespeare" else "\n"
        return text, self.tokenizer.encode(text).tolist()


def expected_mfu(dtype: str) -> float:
    has_amx = jax.default_backend() == "cpu" and "amx_bf16" in processor()[1].split()
    return AMX_MFU if has_amx and dtype == "bfloat16" else EXPECTED_MFU


def predict_step_seconds(plan: RunPlan, best: Ceilings) -> float:
    """Predicts the seconds of a step's products (remat's and Muon's too), the optimizer's traffic, and the dispatch."""
    cfg, is_muon = plan.cfg, plan.recipe.optimizer.kind == "muon"
    products = (plan.step_flops + is_muon * muon_flops(cfg)) / best.peak_flops(cfg.dtype)
    return products / expected_mfu(cfg.dtype) + UPDATE_BYTES * count_params(cfg).total / (1e9 * best.update_gbs) + DISPATCH

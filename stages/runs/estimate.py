"""What a run is about to do and what that will take, by formula: the banner, and all that `--dry-run` prints."""

import dataclasses
import subprocess
import sys

import jax

from engine import format as words
from engine.counting.flops import step_flops, train_flops
from engine.counting.hardware import Ceilings, ceilings, memory_limit_bytes
from engine.counting.memory import training_memory
from engine.counting.params import count_params
from engine.device import Device
from engine.errors import UserError
from engine.files import cache_folder
from engine.model.config import ModelConfig
from engine.text.tokens import TokenFile
from engine.training.loss import loss_chunks
from stages.cli.console import Console
from stages.runs.text_data import TextData
from stages.runs.recipes import Recipe

MEASURE = (
    "from engine.allocator import keep_freed_memory; keep_freed_memory(); "
    "from engine.counting.hardware import ceilings; ceilings(refresh=True)"
)
# What a step is predicted to take: its products at this share of the ceiling, the optimizer's traffic, its dispatch.
EXPECTED = 0.5
UPDATE = 28  # bytes a parameter
FIXED = 0.002  # seconds
OWN = 700_000_000  # bytes that Python, JAX and what was compiled hold beside a step: between 0.3 and 1 GB were seen


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run: the model, how it is trained, for how long."""

    preset: str
    cfg: ModelConfig
    recipe: Recipe
    seed: int
    steps: int | None
    seconds: float | None
    chosen: bool  # whether the length of the run was asked for

    @property
    def step_flops(self) -> int:
        """Model FLOPs of one step, 6N + 12LDT a token."""
        return step_flops(self.cfg, self.recipe.batch, self.recipe.context)

    @property
    def step_tokens(self) -> int:
        return self.recipe.batch * self.recipe.context

    @property
    def memory(self) -> int:
        """Predicted bytes at the fullest moment of a step."""
        part = self.recipe.batch // self.recipe.accumulate
        return training_memory(
            self.cfg, part, self.recipe.context, optimizer=self.recipe.optimizer.kind,
            loss_chunks=loss_chunks(self.cfg, part * self.recipe.context, head_is_frozen=False),
            microbatches=self.recipe.accumulate,
        ).total  # fmt: skip

    def done(self, step: int, elapsed: float) -> float:
        """The share of the run that is done, 1 at its end: of the steps or of the time, whichever is further."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_time))


def ceiling(cfg: ModelConfig, best: Ceilings) -> float:
    """FLOP/s of the machine's best matrix product in the model's compute type."""
    return 1e9 * (best.bf16_gflops if cfg.dtype == "bfloat16" else best.f32_gflops)


def measured_ceilings(console: Console, again: bool = False) -> Ceilings:
    """This machine's ceilings: the best ever measured here, kept in the user's cache.

    They are measured when the cache has none, or `again`: what was measured in a noisy moment is then raised, and a
    share of it is not flattered. On a CPU another process measures, whose arrays are not this run's memory.
    """
    with console.task("measuring this machine's ceilings") as report:
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu and (again or not any(cache_folder("hardware").glob("*.json"))):
            nowhere = subprocess.DEVNULL
            subprocess.run([sys.executable, "-c", MEASURE], stdin=nowhere, stdout=nowhere, stderr=nowhere, check=False)
        return ceilings(refresh=again and not on_cpu, report=report)


def memory_limit() -> int:
    """Bytes that a step may hold: those of the accelerator when there is one, else the host's less OWN."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return (stats or {}).get("bytes_limit") or max(memory_limit_bytes() - OWN, 0)


def check_memory(plan: Plan) -> None:
    """Raises UserError when weights, gradients and optimizer alone are more than there is memory."""
    count = count_params(plan.cfg).total
    least = count * (16 if plan.recipe.optimizer.kind == "adamw" else 12)
    if least > memory_limit():
        raise UserError(
            f"Training {plan.preset} needs at least {words.size(least)} for weights, gradients and optimizer, and "
            f"{words.size(memory_limit())} are left for it. Choose a smaller preset."
        )


def rows(plan: Plan, device: Device, data: TextData, best: Ceilings, folder: object) -> list[tuple[str, str]]:
    """The banner."""
    cfg, recipe, moves = plan.cfg, plan.recipe, plan.recipe.optimizer
    params = count_params(cfg)
    flops = train_flops(cfg, recipe.context, attention="full", remat="none").total
    top = ceiling(cfg, best)
    step_seconds = plan.step_flops / (EXPECTED * top) + UPDATE * params.total / (1e9 * best.update_gbs) + FIXED
    targets = len(data.train.tokens) - 1
    limit = memory_limit()
    heads = f"{cfg.heads} heads" + (f" ({cfg.kv_heads} key/value)" if cfg.kv_heads != cfg.heads else "")
    accumulated = f", {recipe.accumulate} parts at a time" if recipe.accumulate > 1 else ""
    tight = "  ** more than there is: smaller --batch, --accumulate or --remat **" if plan.memory > limit else ""
    steps, long = predict(plan, step_seconds)
    return [
        ("device", str(device)),
        ("text", f"{data.name}: {_extent(data.train)}"),
        ("validation", f"{data.validation_name}: {_extent(data.validation)}"),
        ("model", f"{plan.preset}: {cfg.layers} layers, width {cfg.width}, {heads}, {cfg.vocab:,} tokens, {cfg.dtype}"),
        ("parameters", f"{params.total:,} ({params.total:,} trainable, 0 frozen)"),
        ("FLOPs", f"{words.count(flops)} a token trained (6N + 12LDT, N = {words.count(params.matmul)})"),
        ("step", f"{recipe.batch} x {recipe.context} tokens{accumulated}, {moves.kind}, {moves.schedule}"),
        ("memory", f"about {words.size(plan.memory)} of {words.size(limit)} that are left for a step{tight}"),
        ("length", _length(plan)),
        ("predicted", f"{steps:,} steps, {steps * plan.step_tokens / targets:.2g} epochs, {long} at half of this "
                      f"machine's {words.count(top)}FLOP/s in {cfg.dtype}"),
        ("folder", str(folder)),
    ]  # fmt: skip


def predict(plan: Plan, step_seconds: float) -> tuple[int, str]:
    """(steps, how long they take) when one takes `step_seconds`."""
    limits = [plan.steps] if plan.steps else []
    limits += [max(1, round(plan.seconds / step_seconds))] if plan.seconds else []
    return min(limits), words.duration(min(limits) * step_seconds)


def _length(plan: Plan) -> str:
    steps = f"{plan.steps:,} steps" if plan.steps else ""
    time = f"{words.duration(plan.seconds)} of training time" if plan.seconds else ""
    both = f"{steps} or {time}, whichever ends first" if steps and time else steps or time
    return both if plan.chosen else f"{both}: the default run is time-boxed (--max-time 1h, --steps 5000 change it)"


def _extent(text: TokenFile) -> str:
    return f"{words.size(text.bytes)}, {len(text.tokens):,} tokens"

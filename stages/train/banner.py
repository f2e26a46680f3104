"""The banner of a training run."""

from pathlib import Path

from engine.counting.flops import train_flops
from engine.counting.hardware import Ceilings
from engine.counting.params import count_params
from engine.device import Device
from engine.format import count, duration, size
from engine.text.tokens import TokenFile
from stages.runs.estimate import RunPlan, ceiling, memory_limit
from stages.runs.text_data import TextData

# What a step is predicted to take: its products at this share of the ceiling, the optimizer's traffic, its dispatch.
EXPECTED = 0.5
UPDATE = 28  # bytes a parameter
FIXED = 0.002  # seconds


def banner(plan: RunPlan, data: TextData, best: Ceilings, device: Device, folder: Path, default_length: bool) -> dict[str, str]:
    """Returns the rows of the banner. `default_length`: nobody asked for the length of the run."""
    cfg, recipe, optimizer = plan.cfg, plan.recipe, plan.recipe.optimizer
    params = count_params(cfg)
    flops = train_flops(cfg, recipe.context, attention="full", remat="none").total
    top = ceiling(cfg, best)
    step_seconds = plan.step_flops / (EXPECTED * top) + UPDATE * params.total / (1e9 * best.update_gbs) + FIXED
    limit = memory_limit()
    heads = f"{cfg.heads} heads" + (f" ({cfg.kv_heads} key/value)" if cfg.kv_heads != cfg.heads else "")
    accumulated = f", {recipe.accumulate} parts at a time" if recipe.accumulate > 1 else ""
    tight = "  ** more than there is: smaller --batch, --accumulate or --remat **" if plan.memory > limit else ""
    steps, long = plan.predict(step_seconds)
    epochs = steps * plan.step_tokens / (len(data.train.tokens) - 1)
    return {
        "device": str(device),
        "text": f"{data.name}: {_extent(data.train)}",
        "validation": f"{data.validation_name}: {_extent(data.validation)}",
        "model": f"{plan.name}: {cfg.layers} layers, width {cfg.width}, {heads}, {cfg.vocab:,} tokens, {cfg.dtype}",
        "parameters": f"{params.total:,} ({params.total:,} trainable, 0 frozen)",
        "FLOPs": f"{count(flops)} a token trained (6N + 12LDT, N = {count(params.matmul)})",
        "step": f"{recipe.batch} x {recipe.context} tokens{accumulated}, {optimizer.kind}, {optimizer.schedule}",
        "memory": f"about {size(plan.memory)} of {size(limit)} that are left for a step{tight}",
        "length": _length(plan, default_length),
        "predicted": f"{steps:,} steps, {epochs:.2g} epochs, {long} at half of this machine's {count(top)}FLOP/s "
        f"in {cfg.dtype}",
        "folder": str(folder),
    }


def _length(plan: RunPlan, default_length: bool) -> str:
    steps = f"{plan.steps:,} steps" if plan.steps else ""
    time = f"{duration(plan.seconds)} of training time" if plan.seconds else ""
    both = f"{steps} or {time}, whichever ends first" if steps and time else steps or time
    return f"{both}: the default run is time-boxed (--max-time 1h, --steps 5000 change it)" if default_length else both


def _extent(text: TokenFile) -> str:
    return f"{size(text.bytes)}, {len(text.tokens):,} tokens"

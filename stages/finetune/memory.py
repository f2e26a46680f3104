"""Whether a fine-tuning step fits into memory, and which flags would make it fit."""

import dataclasses

from engine.counting.trainable_paths import all_trainable, lora_only
from engine.errors import UserError
from engine.format import size
from engine.model.config import LoraConfig
from stages.runs import estimate
from stages.runs.estimate import RunPlan


def check_memory(plan: RunPlan, batch: int, is_lora: bool) -> None:
    """Raises UserError when a step would not fit, naming a flag with which it would. `batch`: rows, or pairs."""
    limit = estimate.memory_limit()
    if plan.memory <= limit:
        return
    by_rows = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, accumulate=batch))
    with_remat = dataclasses.replace(by_rows, cfg=dataclasses.replace(plan.cfg, remat="block"))
    remedies = [
        (f"--accumulate {batch}, a row at a time,", by_rows),
        (f"--accumulate {batch} --remat", with_remat),
    ]
    if is_lora:
        remedies.append((f"--base int8 --accumulate {batch} --remat", dataclasses.replace(with_remat, base="int8")))
    else:
        adapter = lora_only(plan.cfg, LoraConfig())
        remedies += [
            (f"a LoRA (no --train, no --freeze) with {flags}", dataclasses.replace(lighter, trainable=adapter))
            for flags, lighter in remedies
        ]
    remedy = next((flags for flags, lighter in remedies if lighter.memory <= limit), "only a smaller model")
    raise UserError(f"A step would need about {size(plan.memory)}, and {size(limit)} are left for it; {remedy} would fit.")


def cost_relative_to_full(plan: RunPlan) -> str:
    """Returns the predicted FLOPs, memory and time (if it follows FLOPs) as shares of those of training everything."""
    full = dataclasses.replace(plan, trainable=all_trainable(plan.cfg), base="float")
    flops, memory = plan.step_flops / full.step_flops, plan.memory / full.memory
    return f"FLOPs {flops:.0%}, memory {memory:.0%}, time {flops:.0%} of a step in which everything is trained (predicted)"

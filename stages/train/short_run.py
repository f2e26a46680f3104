"""Says, before a run starts, that its time holds only a few steps, and what would hold more."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from engine.counting.params import count_params
from engine.format import duration, quantity
from engine.model.config import PRESETS
from stages.runs.estimate import RunPlan
from stages.train.recipes import recipe

MIN_STEPS = 50  # with fewer, a random model learns next to nothing
GOOD_STEPS = 200  # enough to see that training works
MIN_CONTEXT = 256  # tokens: no smaller context is offered


def short_run_note(plan: RunPlan, step_seconds: Callable[[RunPlan], float]) -> str | None:
    """Returns a note when the plan's time ends it within MIN_STEPS steps, else None.

    It says how long a step takes, and offers as flags a longer time, a smaller batch, and a smaller preset, where one
    suffices. `step_seconds(plan)` predicts the seconds of a step.
    """
    step_time, max_time = step_seconds(plan), plan.seconds or math.inf
    if max_time >= min(MIN_STEPS, plan.steps or math.inf) * step_time:
        return None
    hours = GOOD_STEPS * step_time / 3600
    offers = [f"--max-time {math.ceil(hours)}h" if hours > 2 else f"--max-time {math.ceil(60 * hours)}m"]
    offers[0] += f" for {GOOD_STEPS} steps"
    steps_of = lambda smaller: int(max_time / step_seconds(smaller))
    for smaller in _smaller_batches(plan):
        if steps_of(smaller) >= MIN_STEPS:
            flags = f"--batch {smaller.recipe.batch} --context {smaller.recipe.context}"
            offers.append(f"{flags} for about {quantity(steps_of(smaller), plan.noun)} in {duration(max_time)}")
            break
    for smaller in _smaller_presets(plan):
        if steps_of(smaller) >= GOOD_STEPS:
            steps = quantity(steps_of(smaller), plan.noun)
            offers.append(f"the smaller preset {smaller.name} for about {steps} in {duration(max_time)}")
            break
    length = f"{duration(max_time)} is over before the first one ends"
    if max_time >= step_time:
        length = f"{duration(max_time)} holds about {quantity(round(max_time / step_time), plan.noun)}"
    return f"a step takes about {duration(step_time)}, and {length}: too few to learn from. Give {', or '.join(offers)}."


def _smaller_batches(plan: RunPlan) -> list[RunPlan]:
    """Returns plans of fewer tokens a step, most first."""
    recipe = plan.recipe
    batches = [recipe.batch >> halvings for halvings in range(recipe.batch.bit_length())]
    shapes = {(batch, context) for batch in batches for context in (recipe.context, min(MIN_CONTEXT, recipe.context))}
    plans = []
    for batch, context in sorted(shapes - {(recipe.batch, recipe.context)}, key=lambda s: (s[0] * s[1], s[0]), reverse=True):
        cfg = dataclasses.replace(plan.cfg, context=context)
        plans.append(dataclasses.replace(plan, cfg=cfg, recipe=recipe.resize(batch, context)))
    return plans


def _smaller_presets(plan: RunPlan) -> list[RunPlan]:
    """Returns plans of smaller presets by their own recipes, the largest first."""
    sizes = {name: count_params(cfg).total for name, cfg in PRESETS.items()}
    plans = []
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if sizes[name] < count_params(plan.cfg).total:
            preset_recipe = recipe(name, PRESETS[name].vocab)
            optimizer = dataclasses.replace(preset_recipe.optimizer, kind=plan.recipe.optimizer.kind)
            preset_recipe = dataclasses.replace(preset_recipe, optimizer=optimizer)
            remat: Literal["none", "block"] = "block" if preset_recipe.remat else "none"
            cfg = dataclasses.replace(PRESETS[name], context=preset_recipe.context, dtype=plan.cfg.dtype, remat=remat)
            plans.append(dataclasses.replace(plan, name=name, cfg=cfg, recipe=preset_recipe))
    return plans

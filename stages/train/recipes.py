"""Recipes: the hyperparameters of each preset unless flags say otherwise. The only place with such numbers."""

import dataclasses

from engine.training.optimizer import OptimizerConfig
from stages.runs.estimate import Recipe

_MUON = OptimizerConfig(
    kind="muon", learning_rate=0.003, matrix_learning_rate=0.02, schedule="wsd", warmup=0.02, decay=0.5,
    weight_decay=0.1, clip=1.0,
)  # fmt: skip
# Measured on the demo alone: `python -m bench.step --of recipes`. Where the embedding is the head too, neither factor is meant.
_DEMO = dataclasses.replace(_MUON, embedding_factor=10.0, head_factor=0.5)

RECIPES = {
    "tiny": Recipe("bytes", context=64, batch=8, optimizer=_MUON),
    "demo": Recipe("bpe:2048", context=256, batch=8, optimizer=_DEMO),
    "nano": Recipe("bpe:4096", context=256, batch=16, optimizer=_MUON),
}


def recipe(preset: str, vocab: int) -> Recipe:
    """Returns the preset's own recipe, or what suits a large model of a published architecture, with its vocabulary size."""
    large = dataclasses.replace(_MUON, learning_rate=6e-4, decay=0.2)
    return RECIPES.get(preset) or Recipe(
        f"bpe:{vocab}", context=1024, batch=32, optimizer=large, accumulate=8, scan=True, remat=True
    )

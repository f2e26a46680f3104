"""What learns and what stays, from a person's words: `--train 'blocks/(28|29)/.*'`, `--freeze bottom:20`, `--train head`.

Freezing is a matter of trees: `split` parts the params in two, the step differentiates one and only reads the other.
Nothing frozen has a gradient, a moment or a decay, so nothing can move it.
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from engine.counting.params import leaf_shapes
from engine.counting.trainable import TrainablePaths, all_trainable, bottom_frozen, head_only, top_frozen
from engine.errors import UserError, nearest
from engine.model import paths
from engine.model.config import ModelConfig
from engine.model.transformer import Params


class Match(NamedTuple):
    """What one phrase names: leaves and the numbers in them."""

    phrase: str
    leaves: int
    numbers: int


class Choice(NamedTuple):
    """What learns, as the counting rooms read it; what each phrase named; numbers that learn and that stay."""

    trainable_paths: TrainablePaths
    matches: tuple[Match, ...]
    learning: int
    resting: int


def choose(cfg: ModelConfig, train: Sequence[str] = (), freeze: Sequence[str] = ()) -> Choice:
    """What learns: all that a phrase of `train` names (everything, without one), less what a phrase of `freeze` names.

    A phrase is a pattern on whole paths such as `blocks/(28|29)/.*`, or `all`, or `head` (in a tied model its table), or
    `bottom:N` (the lookup table and the lowest N blocks), or `top:N` (the highest N blocks, the last norm, the head).
    Raises UserError when a phrase names nothing, with the nearest path, and when nothing is left to learn.
    """
    shapes = leaf_shapes(cfg)
    numbers = {path: shape[0] * (shape[1] if len(shape) == 2 else 1) for path, shape in shapes.items()}
    named = {phrase: _named(cfg, phrase) for phrase in (*train, *freeze)}
    learning = {path for phrase in train for path in named[phrase]} if train else set(shapes)
    learning -= {path for phrase in freeze for path in named[phrase]}
    if not learning:
        raise UserError(
            f"Nothing is left to learn: --freeze {' '.join(freeze)} names all that would be trained. Freeze less of it."
        )
    total = sum(numbers[path] for path in learning)
    return Choice(
        all_trainable(cfg) if len(learning) == len(shapes) else TrainablePaths(frozenset(learning)),
        tuple(Match(phrase, len(found), sum(numbers[path] for path in found)) for phrase, found in named.items()),
        total,
        sum(numbers.values()) - total,
    )


def split(params: Params, trainable_paths: TrainablePaths) -> tuple[Params, Params]:
    """(trainable, frozen). `paths.merge` puts them together again."""
    return paths.split(params, trainable_paths.weights)


def _named(cfg: ModelConfig, phrase: str) -> Collection[str]:
    shapes = leaf_shapes(cfg)
    end = re.fullmatch(r"(bottom|top):(\d+)", phrase)
    if end:
        without = bottom_frozen if end[1] == "bottom" else top_frozen
        found = shapes.keys() - without(cfg, int(end[2])).weights
        if not found:
            raise UserError(f"{phrase!r} names no block: give a number from 1 to {cfg.layers}.")
    elif phrase == "all":
        found = set(shapes)
    elif phrase == "head":
        found = set(head_only(cfg).weights)
    else:
        try:
            found = {path for path in shapes if re.fullmatch(phrase, path)}
        except re.error as error:
            raise UserError(f"{phrase!r} is not a pattern: {error}. Write for example 'blocks/(28|29)/.*'.") from error
    if not found:
        raise UserError(f"{phrase!r} matches no parameter.{nearest(phrase, list(shapes))}")
    return found

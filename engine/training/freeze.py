"""What learns and what stays, from a person's words: `--train 'blocks/(28|29)/.*'`, `--freeze bottom:20`, `--train head`.

Freezing is a matter of trees: `split` parts the params in two, the step differentiates one and only reads the other.
Nothing frozen has a gradient, a moment or a decay, so nothing can move it.
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from engine.counting.params import leaf_shapes
from engine.counting.trainable_paths import TrainablePaths, all_trainable, bottom_frozen, head_only, top_frozen
from engine.errors import UserError, nearest
from engine.model import paths
from engine.model.config import ModelConfig
from engine.model.transformer import Params


class Match(NamedTuple):
    """What one rule names: leaves and the numbers in them."""

    rule: str
    leaves: int
    numbers: int


class Selection(NamedTuple):
    """What trains, what each rule matched, and how many numbers train."""

    trainable_paths: TrainablePaths
    matches: tuple[Match, ...]
    trainable_count: int


def select_trainable(cfg: ModelConfig, train: Sequence[str] = (), freeze: Sequence[str] = ()) -> Selection:
    """What learns: all that a rule of `train` names (everything, without one), less what a rule of `freeze` names.

    A rule is a pattern on whole paths such as `blocks/(28|29)/.*`, or `all`, or `head` (in a tied model its table), or
    `bottom:N` (the lookup table and the lowest N blocks), or `top:N` (the highest N blocks, the last norm, the head).
    Raises UserError when a rule names nothing, with the nearest path, and when nothing is left to learn.
    """
    shapes = leaf_shapes(cfg)
    numbers = {path: shape[0] * (shape[1] if len(shape) == 2 else 1) for path, shape in shapes.items()}
    named = {rule: _named(cfg, rule) for rule in (*train, *freeze)}
    learning = {path for rule in train for path in named[rule]} if train else set(shapes)
    learning -= {path for rule in freeze for path in named[rule]}
    if not learning:
        raise UserError(
            f"Nothing is left to learn: --freeze {' '.join(freeze)} names all that would be trained. Freeze less of it."
        )
    return Selection(
        all_trainable(cfg) if len(learning) == len(shapes) else TrainablePaths(frozenset(learning)),
        tuple(Match(rule, len(found), sum(numbers[path] for path in found)) for rule, found in named.items()),
        sum(numbers[path] for path in learning),
    )


def split(params: Params, trainable_paths: TrainablePaths) -> tuple[Params, Params]:
    """(trainable, frozen). `paths.merge` puts them together again."""
    return paths.split(params, trainable_paths.weights)


def _named(cfg: ModelConfig, rule: str) -> Collection[str]:
    shapes = leaf_shapes(cfg)
    end = re.fullmatch(r"(bottom|top):(\d+)", rule)
    if end:
        without = bottom_frozen if end[1] == "bottom" else top_frozen
        found = shapes.keys() - without(cfg, int(end[2])).weights
        if not found:
            raise UserError(f"{rule!r} names no block: give a number from 1 to {cfg.layers}.")
    elif rule == "all":
        found = set(shapes)
    elif rule == "head":
        found = set(head_only(cfg).weights)
    else:
        try:
            found = {path for path in shapes if re.fullmatch(rule, path)}
        except re.error as error:
            raise UserError(f"{rule!r} is not a pattern: {error}. Write for example 'blocks/(28|29)/.*'.") from error
    if not found:
        raise UserError(f"{rule!r} matches no parameter.{nearest(rule, list(shapes))}")
    return found

"""Selects the trainable parameters by rules: `--train 'blocks/(28|29)/.*'`, `--freeze bottom:20`, `--train head`.

`paths.split` then makes two trees, and the step differentiates one of them. Nothing frozen has a gradient, a moment or
weight decay.
"""

import re
from collections.abc import Collection, Sequence

from engine.counting.params import TrainablePaths, bottom_frozen, leaf_shapes, top_frozen
from engine.errors import UserError, did_you_mean
from engine.model.config import ModelConfig


def select_trainable(
    cfg: ModelConfig, train: Sequence[str] = (), freeze: Sequence[str] = ()
) -> tuple[TrainablePaths, dict[str, Collection[str]]]:
    """Selects all that rules of `train` match (without one, everything), less what rules of `freeze` match.

    Returns the paths, and those that each rule matches. A rule is a pattern on whole paths such as `blocks/(28|29)/.*`, or
    `all`, `head` (tied: the embedding), `bottom:N` (the embedding and the lowest N blocks), or `top:N` (the highest N blocks,
    the last norm, the head). Raises UserError when a rule matches nothing, with the nearest path, and when nothing is left.
    """
    matches = {rule: _match(cfg, rule) for rule in (*train, *freeze)}
    trainable = {path for rule in train for path in matches[rule]} if train else {*leaf_shapes(cfg)}
    trainable -= {path for rule in freeze for path in matches[rule]}
    if not trainable:
        raise UserError(
            f"Nothing is left to train: --freeze {' '.join(freeze)} names all that would be trained. Freeze less of it."
        )
    return TrainablePaths(frozenset(trainable)), matches


def _match(cfg: ModelConfig, rule: str) -> Collection[str]:
    shapes = leaf_shapes(cfg)
    if end := re.fullmatch(r"(bottom|top):(\d+)", rule):
        without = bottom_frozen if end[1] == "bottom" else top_frozen
        frozen = shapes.keys() - without(cfg, int(end[2])).weights
        if not frozen:
            raise UserError(f"{rule!r} names no block: give a number from 1 to {cfg.layers}.")
        return frozen
    pattern = {"all": ".*", "head": "embed" if cfg.tied else "head"}.get(rule, rule)
    try:
        matches = [path for path in shapes if re.fullmatch(pattern, path)]
    except re.error as error:
        raise UserError(f"{rule!r} is not a pattern: {error}. Write for example 'blocks/(28|29)/.*'.") from error
    if not matches:
        raise UserError(f"{rule!r} matches no parameter.{did_you_mean(rule, list(shapes))}")
    return matches

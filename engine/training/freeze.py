"""Selects trainable parameters by rules, such as `--train head` or `--freeze bottom:20`.

`paths.split` then makes two trees, and the step differentiates one of them. Nothing frozen has a
gradient, a moment or weight decay.
"""

import re
from collections.abc import Collection, Sequence

from engine.errors import UserError, did_you_mean
from engine.model.config import ModelConfig
from engine.model.shapes import leaf_shapes
from engine.model.trainable import TrainablePaths


def select_trainable(
    cfg: ModelConfig, train: Sequence[str] = (), freeze: Sequence[str] = ()
) -> tuple[TrainablePaths, dict[str, Collection[str]]]:
    """Selects all that rules of `train` match (without one, everything), less what rules of
    `freeze` match.

    Returns the paths, and those that each rule matches. A rule is a pattern on whole paths such as
    `blocks/(28|29)/.*`, or `all`, `head` (tied: the embedding, which feeds the lowest block too, so
    that training it alone saves only dW), `bottom:N` (the embedding, a tied one too, and the lowest
    N blocks), or `top:N` (the highest N blocks, the last norm, an untied head). Raises UserError
    when a rule matches nothing, with the nearest path, and when nothing is left.
    """
    matches = {rule: _match(cfg, rule) for rule in (*train, *freeze)}
    trainable = {*leaf_shapes(cfg)}
    if train:
        trainable = set().union(*(matches[rule] for rule in train))
    trainable = trainable.difference(*(matches[rule] for rule in freeze))
    if not trainable:
        raise UserError(
            f"Nothing is left to train: {' '.join(freeze)} names all that would be trained. "
            "Freeze less of it."
        )
    return TrainablePaths(frozenset(trainable)), matches


def _match(cfg: ModelConfig, rule: str) -> Collection[str]:
    shapes = leaf_shapes(cfg)
    end = re.fullmatch(r"(bottom|top):(\d+)", rule)
    if end:
        count = int(end[2])
        is_bottom = end[1] == "bottom"
        if not 1 <= count <= cfg.layers:
            raise UserError(
                f"{rule!r} names no blocks: the model has {cfg.layers}; give a number from 1 to that."
            )
        if is_bottom:
            beginnings = ["embed"]
            layers = range(count)
        else:
            beginnings = ["norm", "head"]
            layers = range(cfg.layers - count, cfg.layers)
        beginnings += [f"blocks/{layer}/" for layer in layers]
        return [path for path in shapes if path.startswith(tuple(beginnings))]
    pattern = {"all": ".*", "head": cfg.head_path}.get(rule, rule)
    try:
        matches = [path for path in shapes if re.fullmatch(pattern, path)]
    except re.error as error:
        raise UserError(
            f"{rule!r} is not a pattern: {error}. Write for example 'blocks/(28|29)/.*'."
        ) from error
    if not matches:
        raise UserError(f"{rule!r} matches no parameter.{did_you_mean(rule, list(shapes))}")
    return matches

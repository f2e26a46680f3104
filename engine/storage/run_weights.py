"""Compares the arrays of a run's checkpoint with the model that its config describes, before one is read.

A manifest shows damage, but proves nothing of who wrote the files: whoever makes a run folder makes
its manifest too.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.model.shapes import leaf_shapes
from engine.model.weights.block_layout import (
    GROUP,
    KINDS,
    ROUNDED,
    factors_shape,
    has_finite_factors,
    packed_shape,
)
from engine.model.weights.blocks import Blocks
from engine.untrusted import quote

# in run.json: the paths of weights in blocks whose factors trained
TRAINED_BLOCKS = "trained_blocks"
PACKED = "packed/"  # before the path of a weight in blocks
FLOAT32 = ("float32",)
# bfloat16 where a model was loaded in it and the matrix stayed frozen
MATRIX_DTYPES = ("float32", "bfloat16")


class ExpectedArray(NamedTuple):
    """The shape of an array in a checkpoint, and the dtypes that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def expected_arrays(
    cfg: ModelConfig, arrays: Mapping[str, Any], trained_blocks: Collection[str] | None
) -> dict[str, ExpectedArray]:
    """Returns what the params of a checkpoint should hold, by path.

    `arrays`: what is there, each with a shape; it tells which matrices are in blocks, and of which
    kind. `trained_blocks`: the paths of those whose factors trained; None where the run does not
    tell, as those of earlier versions.
    """
    # A config may claim any number of layers, which would take for ever to list. With one layer
    # more than there are arrays one array is missing already.
    cfg = dataclasses.replace(cfg, layers=min(cfg.layers, len(arrays) + 1))
    trained: Collection[str] = arrays
    if trained_blocks is not None:
        trained = trained_blocks
    expected = {}
    for path, shape in leaf_shapes(cfg).items():
        packed = arrays.get(PACKED + path)
        if len(shape) != 2:
            expected[path] = ExpectedArray(shape, FLOAT32)
            continue
        columns, inputs = shape if path == "embed" else shape[::-1]
        if packed is None or inputs % GROUP:
            expected[path] = ExpectedArray(shape, MATRIX_DTYPES)
            continue
        kind = _kind_in_run(packed.shape)
        expected[PACKED + path] = ExpectedArray(packed_shape(columns, inputs, kind), ("uint8",))
        if path in trained:
            expected[path] = ExpectedArray(factors_shape(columns, inputs, kind), FLOAT32)
    return expected


def _kind_in_run(shape: tuple[int, ...]) -> str:
    """Returns the kind of an array of blocks in a run; Q8_0 for a shape that is of no kind there."""
    for kind in ROUNDED:
        if shape and shape[-1] == KINDS[kind].bytes:
            return kind
    return "Q8_0"


def check_arrays(
    cfg: ModelConfig,
    checkpoint: Path,
    arrays: Mapping[str, Any],
    *,
    trained_blocks: Collection[str] | None = None,
) -> None:
    """Raises UserError unless arrays, each with a shape and a dtype, are by path those of
    `expected_arrays`.
    """
    expected = expected_arrays(cfg, arrays, trained_blocks)
    faults = []
    for path, (shape, dtypes) in expected.items():
        array = arrays.get(path)
        wanted = f"{' or '.join(dtypes)} {list(shape)}"
        if array is None:
            faults.append(f"it has no {path}, which should be {wanted}")
        elif tuple(array.shape) != shape or np.dtype(array.dtype).name not in dtypes:
            faults.append(
                f"{path} should be {wanted}, and is {np.dtype(array.dtype).name} {list(array.shape)}"
            )
    faults += [
        f"it has an array {quote(path)}, which has no place there" for path in arrays if path not in expected
    ]
    if faults:
        if len(faults) > 1:
            more = f" ({len(faults) - 1} more arrays differ)"
        else:
            more = ""
        raise UserError(
            f"{checkpoint / 'params.safetensors'} does not hold the model that the config describes: "
            f"{faults[0]}{more}. Restore the run from a copy, or train anew."
        )


def check_factors(checkpoint: Path, leaves: Mapping[str, Any]) -> None:
    """Raises UserError for Blocks with a scale or minimum that is not a finite number."""
    for path, leaf in leaves.items():
        if isinstance(leaf, Blocks) and not has_finite_factors(np.asarray(leaf.packed)):
            raise UserError(
                f"{checkpoint / 'params.safetensors'} is damaged: {path} has a block whose scale "
                "or minimum is not a finite number. Restore the run from a copy, or train anew."
            )

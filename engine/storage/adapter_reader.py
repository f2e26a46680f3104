"""Reads LoRA adapters in PEFT's layout (`adapter.py`), and checks that they fit their base."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from engine import manifest
from engine.errors import UserError
from engine.model.config import ModelConfig
from engine.model.paths import unflatten
from engine.model.weights.lora import LoRA
from engine.storage import safetensors
from engine.storage.adapter import BASE, CONFIG, MODEL, WEIGHTS, DoRA, Replacement
from engine.storage.tensor_layout import HUGGING_FACE_NAMES, Leaf, layout_of
from engine.untrusted import Fields, quote, read_json_object

# Values of a field that mean that what it names is not in use.
UNUSED: tuple[Any, ...] = (None, False, {}, [])
# Fields of PEFT that change what an adapter computes or where it is applied, and are not read here
# -> the values that do not. Other ways to begin an adapter, such as PiSSA and OLoRA, take its first
# product out of the base's weights.
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
    "fan_in_fan_out": UNUSED,
    "lora_bias": UNUSED,
    "layer_replication": UNUSED,
    "trainable_token_indices": UNUSED,
    "target_parameters": UNUSED,
    "alora_invocation_tokens": UNUSED,
    "use_qalora": UNUSED,
}


def load_adapter(
    folder: Path, cfg: ModelConfig, digest_base: Callable[[], str] | None = None
) -> dict[str, Any]:
    """Checks an adapter's files by their manifest, if there is one, and reads them by
    `read_leaves`. Raises UserError.

    A run's checkpoint is an adapter too, which may be shared without the state of its optimizer.
    """
    if (folder / manifest.NAME).exists():
        damaged = manifest.verify(folder, skip="optimizer", extra=False)
        if damaged:
            raise UserError(
                f"The adapter {folder} is damaged: {'; '.join(damaged)}. "
                f"Restore it, or train it again; after a change of your own, remove {manifest.NAME}."
            )
    return read_leaves(folder, cfg, digest_base)


def read_leaves(
    folder: Path, cfg: ModelConfig, digest_base: Callable[[], str] | None = None
) -> dict[str, Any]:
    """Reads a tree of LoRA, DoRA and Replacement leaves, without their base.

    `digest_base` returns the digest of the model that the adapter is to go on. It may take seconds,
    and is called only where the adapter names the digest of the model that it was trained on.

    Raises UserError, too, when its metadata name other weights, or it does not fit the model.
    """
    if not is_adapter(folder):
        raise UserError(f"There is no adapter at {folder}: it has no {CONFIG} and {WEIGHTS}.")
    path = folder / WEIGHTS
    fields = Fields(read_json_object(folder / CONFIG), folder / CONFIG)
    fields.check(ONLY)
    tensors, metadata = safetensors.read_header(path)
    trained_on = metadata.get(BASE)
    if digest_base is not None and trained_on is not None:
        _check_base(folder, digest_base, trained_on)
    arrays = {name: _read(path, name, tensor) for name, tensor in tensors.items()}
    leaves: dict[str, Any] = {}
    for leaf in layout_of(cfg, HUGGING_FACE_NAMES):
        whole = arrays.pop(MODEL + leaf.name, None)
        if whole is not None:
            leaves[leaf.path] = _replacement(path, fields, cfg, leaf, whole)
        elif leaf.path.rpartition("/")[2] in cfg.matrices:
            module = leaf.name.removesuffix(".weight")
            tensors_of_module = _take_tensors(arrays, module)
            if tensors_of_module.a is not None or tensors_of_module.b is not None:
                leaves[leaf.path] = _join(path, fields, module, tensors_of_module, leaf.stored)
    if arrays:
        raise UserError(f"{path} has a tensor {quote(min(arrays))}, which has no place in this architecture.")
    if not leaves:
        raise UserError(f"{folder} is damaged: it holds no adapter of any matrix.")
    return unflatten(leaves)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def base_name(folder: Path) -> str:
    """Returns the name of an adapter's base: a folder, or an id on the Hugging Face hub; empty when
    unknown.
    """
    name = read_json_object(folder / CONFIG).get("base_model_name_or_path")
    if isinstance(name, str) and name.isprintable():
        return name
    return ""


def _read(path: Path, name: str, tensor: safetensors.StoredTensor) -> np.ndarray:
    if not tensor.shape or tensor.dtype not in safetensors.FLOATS:
        raise UserError(
            f"{path}: the tensor {quote(name)} is {tensor.dtype} {list(tensor.shape)}, which is no weight."
        )
    array = safetensors.read_slice(tensor, 0, tensor.shape[0]).astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{path} is damaged: the tensor {quote(name)} holds a number that is not finite.")
    return array


def _replacement(path: Path, fields: Fields, cfg: ModelConfig, leaf: Leaf, whole: np.ndarray) -> Replacement:
    """Returns the weight that stands for a leaf, by a tensor that was trained whole. Raises UserError
    where it does not fit, or the model cannot compute with it.
    """
    if whole.shape != leaf.stored:
        raise UserError(
            f"{path}: {MODEL}{leaf.name} should be {list(leaf.stored)} and is {list(whole.shape)}."
        )
    if leaf.path == "embed" and cfg.tied and not fields.flag("ensure_weight_tying"):
        raise UserError(
            f"{path} has an embedding that was trained whole, "
            "and the head, which is the same matrix in this model, as it was: "
            f"that can be computed here only where {CONFIG} says ensure_weight_tying."
        )
    if leaf.transposed:
        whole = whole.T
    return Replacement(jax.device_put(whole))


class _ModuleTensors(NamedTuple):
    """The tensors of a module in an adapter's file, those that it has: the pair a (R, in), b (out, R),
    and a DoRA's magnitude (out,).
    """

    a: np.ndarray | None
    b: np.ndarray | None
    magnitude: np.ndarray | None


def _tensor_name(module: str, side: Literal["A", "B"]) -> str:
    """Returns the name in an adapter's file of a half of a module's pair."""
    return f"{MODEL}{module}.lora_{side}.weight"


def _take_tensors(arrays: dict[str, np.ndarray], module: str) -> _ModuleTensors:
    """Removes a module's tensors from the arrays that were read, and returns them."""
    return _ModuleTensors(
        a=arrays.pop(_tensor_name(module, "A"), None),
        b=arrays.pop(_tensor_name(module, "B"), None),
        magnitude=arrays.pop(f"{MODEL}{module}.lora_magnitude_vector", None),
    )


def _join(
    path: Path, fields: Fields, module: str, tensors: _ModuleTensors, stored: tuple[int, ...]
) -> LoRA | DoRA:
    """Returns the adapter of a matrix, `stored` (out, in) in its base's file, by a module's tensors."""
    a, b, magnitude = tensors
    if a is None:
        raise _half_alone(path, _tensor_name(module, "B"))
    if b is None:
        raise _half_alone(path, _tensor_name(module, "A"))
    rank = _setting(fields, "rank_pattern", module, int, fields.number("r", int))
    alpha = _setting(fields, "alpha_pattern", module, float, fields.number("lora_alpha", float))
    if rank < 1:
        raise UserError(f"{fields.path}: the rank of {module} is 0, and should be at least 1.")
    if (a.shape, b.shape) != ((rank, stored[1]), (stored[0], rank)):
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise UserError(
            f"{path}: the pair of {module} is {shapes}; its matrix is {list(stored)}, and its rank {rank}."
        )
    # jnp.asarray would compile a program for each shape, while a server serves
    a_on_device, b_on_device = jax.device_put((a.T, b.T))
    divisor: float = rank
    if fields.values.get("use_rslora"):
        divisor = rank**0.5
    adapter = LoRA(None, a_on_device, b_on_device, alpha / divisor)
    if not fields.values.get("use_dora"):
        if magnitude is not None:
            raise UserError(
                f"{path} has a lora_magnitude_vector of {module}, "
                f"and {fields.path.name} does not say use_dora."
            )
        return adapter
    if magnitude is None or magnitude.shape != stored[:1]:
        raise UserError(
            f"{path} has no lora_magnitude_vector "
            f"of {stored[0]} numbers for {module}, which use_dora asks for."
        )
    return DoRA(adapter, jax.device_put(magnitude))


def _half_alone(path: Path, name: str) -> UserError:
    return UserError(f"{path} has {name!r} alone, without the other half of a pair.")


def _setting[T: (int, float)](fields: Fields, name: str, module: str, kind: type[T], default: T) -> T:
    """Returns a module's own rank or alpha, by the first name in the field that ends the module's,
    else `default`.

    PEFT's names may be regular expressions, which are refused: one from an untrusted file can take
    for ever.
    """
    patterns = fields.values.get(name) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{fields.path}: {name} should be an object.")
    for pattern in patterns:
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise UserError(
                f"{fields.path}: {name} has {quote(pattern)}, "
                "and only names of modules are read, no patterns."
            )
        plain = pattern.removeprefix("^")
        if module == plain or (plain == pattern and module.endswith(f".{plain}")):
            return Fields(patterns, fields.path, f"{name}.").number(pattern, kind)
    return default


def _check_base(folder: Path, digest_base: Callable[[], str], trained_on: str) -> None:
    """Raises UserError unless `trained_on`, the digest of the model that an adapter was trained on,
    is `digest_base()`.
    """
    own = digest_base()
    if trained_on != own:
        raise UserError(
            f"The adapter {folder} was trained on another model: "
            f"its base has the digest {quote(trained_on[:16])}, this one {own[:16]!r}. "
            f"It was trained on {ascii(base_name(folder))[:300]}."
        )

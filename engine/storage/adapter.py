"""Saves and loads LoRA adapters in PEFT's layout, with the digest of the weights they were trained on.

    FOLDER/adapter_config.json         rank, alpha, adapted modules and the name of the base, as PEFT reads them
           adapter_model.safetensors   lora_A (R, in) and lora_B (out, R) of every adapted matrix, float32; its metadata:
                                       thrice.base, digest of the base's params
           manifest.json               SHA-256 of every file, which other libraries do not look at

A checkpoint of a LoRA run is such a folder, with the optimizer's state beside it (`checkpoint.py`).
PEFT's own adapters have neither metadata nor manifest; they are read too, and only shapes tell
whether they fit. So are rsLoRA, ranks and alphas by module, DoRA, and modules that were trained
whole.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import manifest
from engine.errors import UserError
from engine.files import atomic_folder, write_json
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import leaf_paths, map_paths, unflatten
from engine.model.weights.blocks import Blocks
from engine.model.weights.lora import LoRA, to_dense
from engine.storage import safetensors, safetensors_writer
from engine.storage.digest import digest
from engine.storage.tensor_layout import HUGGING_FACE_NAMES, Leaf, layout_of
from engine.untrusted import Fields, quote, read_json_object

CONFIG = "adapter_config.json"
PART = "adapter_model"
WEIGHTS = f"{PART}.safetensors"
BASE = "thrice.base"
# Fields of PEFT that change what an adapter computes or where it is applied, and are not read here
# -> the values that do not. Other ways to begin an adapter, such as PiSSA and OLoRA, take its first
# product out of the base's weights.
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
} | dict.fromkeys(
    (
        "fan_in_fan_out",
        "lora_bias",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
        "use_qalora",
    ),
    (None, False, {}, []),
)
MODEL = "base_model.model."  # before the base's own name of a module


class DoRA(NamedTuple):
    """An adapter, and the length of each column of the adapted matrix, (out,) (Liu et al. 2024,
    2402.09353).
    """

    adapter: LoRA
    magnitude: jax.Array

    def on(self, base: Any) -> jax.Array:
        """Returns magnitude (base + scale a b) / its columns' norms, equation 5, in the base's dtype."""
        weight = to_dense(base)
        merged = to_dense(self.adapter.on(weight.astype(jnp.float32)))
        return (merged * (self.magnitude / jnp.linalg.norm(merged, axis=0))).astype(weight.dtype)


class Replacement(NamedTuple):
    """A weight that was trained whole beside the adapters (PEFT's modules_to_save)."""

    weight: jax.Array

    def on(self, base: Any) -> jax.Array:
        return self.weight.astype(to_dense(base).dtype)


class SavedAdapter(NamedTuple):
    """What the files of an adapter say beside its tensors.

    `base`: digest of the base's params as loaded. `ranks` and `alphas`: of modules whose own differ
    from `rank` and `alpha`. `layers`: those that are adapted, None for all.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    base: str
    base_name: str
    ranks: Mapping[str, int] = {}
    alphas: Mapping[str, float] = {}
    layers: list[int] | None = None

    @property
    def metadata(self) -> dict[str, str]:
        return {BASE: self.base}

    def config(self) -> dict[str, Any]:
        """Returns the contents of adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_name,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(self.modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.alphas,
            "layers_to_transform": self.layers,
        }


def saved_run_adapter(lora: LoraConfig, *, base: str, base_name: str) -> SavedAdapter:
    """Returns what the checkpoints of a LoRA run say of their adapter."""
    modules = (_module(f"blocks/0/{name}").rpartition(".")[2] for name in lora.adapted_matrices)
    return SavedAdapter(lora.rank, lora.alpha, tuple(modules), base, base_name)


def adapter_tensors(leaves: dict[str, LoRA]) -> dict[str, np.ndarray]:
    """Returns the tensors of adapter_model.safetensors by name: float32 views of each leaf's pair,
    transposed.
    """
    tensors = {}
    for path, leaf in leaves.items():
        prefix = f"{MODEL}{_module(path)}"
        tensors[f"{prefix}.lora_A.weight"] = np.asarray(leaf.a, np.float32).T
        tensors[f"{prefix}.lora_B.weight"] = np.asarray(leaf.b, np.float32).T
    return tensors


def _module(path: str) -> str:
    """Returns PEFT's name of an adapted matrix: model.layers.0.self_attn.q_proj of blocks/0/q."""
    _, layer, name = path.split("/")
    return HUGGING_FACE_NAMES[name].format(layer).removesuffix(".weight")


def save_adapter(
    folder: Path, cfg: ModelConfig, params: dict[str, Any], *, base: str, base_name: str
) -> Path:
    """Writes the LoRA leaves of params (with or without their base) in place of `folder`,
    atomically; returns it.

    `base`: digest of the base's params as loaded. Raises UserError when there is no LoRA leaf, or
    one lies on another.
    """
    leaves = adapter_leaves(params)
    saved = _describe_adapter(cfg, leaves, base=base, base_name=base_name)
    tensors = adapter_tensors(leaves)
    with atomic_folder(folder) as building:
        write_json(building / CONFIG, saved.config())
        safetensors_writer.write_file(building / WEIGHTS, tensors, tensors.values(), saved.metadata)
        manifest.write_manifest(building)
    return folder


def _describe_adapter(
    cfg: ModelConfig, leaves: dict[str, LoRA], *, base: str, base_name: str
) -> SavedAdapter:
    """Returns what the files of an adapter say of its leaves: the most frequent rank and scale, and
    the modules whose own differ.
    """
    frequencies = Counter((leaf.rank, leaf.scale) for leaf in leaves.values())
    (rank, scale), _ = frequencies.most_common(1)[0]
    modules = set()
    layers = set()
    ranks = {}
    alphas = {}
    for path, leaf in leaves.items():
        module = _module(path)
        layers.add(int(path.split("/")[1]))
        modules.add(module.rpartition(".")[2])
        if (leaf.rank, leaf.scale) != (rank, scale):
            ranks[module] = leaf.rank
            alphas[module] = leaf.scale * leaf.rank
    adapted_layers = None
    if layers != set(range(cfg.layers)):
        adapted_layers = sorted(layers)
    return SavedAdapter(
        rank=rank,
        alpha=scale * rank,
        modules=tuple(modules),
        base=base,
        base_name=base_name,
        ranks=ranks,
        alphas=alphas,
        layers=adapted_layers,
    )


def config_of(cfg: ModelConfig, leaves: dict[str, Any]) -> LoraConfig | None:
    """Returns the config that describes an adapter's leaves; None unless all have one rank and one
    scale, in every layer.
    """
    if not all(isinstance(leaf, LoRA) for leaf in leaves.values()):
        return None
    kinds = {(leaf.rank, leaf.scale) for leaf in leaves.values()}
    names = [name for name in cfg.matrices if any(path.endswith(f"/{name}") for path in leaves)]
    if len(kinds) != 1 or len(leaves) != cfg.layers * len(names):
        return None
    rank, scale = kinds.pop()
    if len(names) == len(cfg.matrices):
        names = ["all"]
    return LoraConfig(rank, rank * scale, tuple(names))


def adapter_leaves(params: dict[str, Any]) -> dict[str, LoRA]:
    """Returns the LoRA leaves by path. Raises UserError when there are none, or one lies on another."""
    leaves = {path: leaf for path, leaf in leaf_paths(params).items() if isinstance(leaf, LoRA)}
    if not leaves:
        raise UserError("This model has no LoRA adapters to write; write all of it instead.")
    if any(isinstance(leaf.base, LoRA) for leaf in leaves.values()):
        raise UserError(
            "This model has several adapters on one base, "
            "and PEFT's layout holds one; export it merged instead."
        )
    return leaves


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
        check_base(folder, digest_base, trained_on, base_name(folder))
    arrays = {name: _read(path, name, tensor) for name, tensor in tensors.items()}
    leaves: dict[str, Any] = {}
    for leaf in layout_of(cfg, HUGGING_FACE_NAMES):
        whole = arrays.pop(MODEL + leaf.name, None)
        if whole is not None:
            leaves[leaf.path] = _replacement(path, fields, cfg, leaf, whole)
        elif leaf.path.rpartition("/")[2] in cfg.matrices:
            module = leaf.name.removesuffix(".weight")
            pair = {}
            for side in "AB":
                half = f"{MODEL}{module}.lora_{side}.weight"
                if half in arrays:
                    pair[half] = arrays.pop(half)
            magnitude = arrays.pop(f"{MODEL}{module}.lora_magnitude_vector", None)
            if pair:
                leaves[leaf.path] = _join(path, fields, module, pair, leaf.stored, magnitude)
    if arrays:
        raise UserError(f"{path} has a tensor {quote(min(arrays))}, which has no place in this architecture.")
    if not leaves:
        raise UserError(f"{folder} is damaged: it holds no adapter of any matrix.")
    return unflatten(leaves)


def put_on(params: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """Returns params with an adapter of `load_adapter` on them; a DoRA is merged, and what trained
    whole stands for its weight.

    Raises ValueError when a LoRA does not fit.
    """
    leaves = leaf_paths(params)
    for path, part in leaf_paths(adapter).items():
        leaves[path] = part.on(leaves[path])
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


def _join(
    path: Path,
    fields: Fields,
    module: str,
    pair: dict[str, np.ndarray],
    stored: tuple[int, ...],
    magnitude: np.ndarray | None,
) -> LoRA | DoRA:
    """Returns the adapter of a matrix, `stored` (out, in) in its base's file, by a pair (R, in), (out, R)."""
    if len(pair) == 1:
        raise UserError(f"{path} has {next(iter(pair))!r} alone, without the other half of a pair.")
    rank = _setting(fields, "rank_pattern", module, fields.number("r", int))
    alpha = _setting(fields, "alpha_pattern", module, fields.number("lora_alpha", float))
    if rank < 1:
        raise UserError(f"{fields.path}: the rank of {module} is 0, and should be at least 1.")
    a, b = pair.values()
    if (a.shape, b.shape) != ((rank, stored[1]), (stored[0], rank)):
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise UserError(
            f"{path}: the pair of {module} is {shapes}; its matrix is {list(stored)}, and its rank {rank}."
        )
    # jnp.asarray would compile a program for each shape, while a server serves
    a, b = jax.device_put((a.T, b.T))
    divisor = rank**0.5 if fields.values.get("use_rslora") else rank
    adapter = LoRA(None, a, b, alpha / divisor)
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


def _setting(fields: Fields, name: str, module: str, default: Any) -> Any:
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
            return Fields(patterns, fields.path, f"{name}.").number(pattern, type(default))
    return default


class _Widened:
    """A matrix in Blocks as an array of a dtype, which exists only while it is read."""

    def __init__(self, blocks: Blocks, dtype: Any) -> None:
        self.blocks = blocks
        self.dtype = np.dtype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(to_dense(self.blocks), self.dtype)


def base_digest(params: dict[str, Any], dtype: str = "float32") -> str:
    """Returns the digest by which an adapter names its base.

    `dtype`: that of matrices in Blocks, where an adapter was trained on them.
    """

    def widen(_: str, leaf: Any) -> Any:
        if isinstance(leaf, Blocks):
            return _Widened(leaf, dtype)
        return leaf

    return digest(map_paths(widen, params))


def check_base(folder: Path, digest_base: Callable[[], str], trained_on: str, base_name: Any) -> None:
    """Raises UserError unless `trained_on`, the digest of the model that an adapter was trained on,
    is `digest_base()`.
    """
    own = digest_base()
    if trained_on != own:
        raise UserError(
            f"The adapter {folder} was trained on another model: "
            f"its base has the digest {quote(trained_on[:16])}, this one {own[:16]!r}. "
            f"It was trained on {ascii(base_name)[:300]}."
        )


def without_adapters(params: dict[str, Any]) -> dict[str, Any]:
    def base_of(_: str, leaf: Any) -> Any:
        if isinstance(leaf, LoRA):
            return leaf.base
        return leaf

    return map_paths(base_of, params)

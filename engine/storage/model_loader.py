"""Finds and loads the model that `--model` names: by its name or path, with or without adapters on it."""

import contextlib
import dataclasses
import functools
import math
import os.path
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax

from engine import manifest
from engine.counting.hardware import require_memory
from engine.counting.params import count_params
from engine.errors import UserError, did_you_mean
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import leaf_paths, unflatten
from engine.model.shapes import leaf_shapes
from engine.model.weights.blocks import Blocks, with_factors
from engine.model.weights.lora import LoRA, to_dense
from engine.storage import checkpoint_reader, hub, huggingface, run_folder
from engine.storage.adapter import CONFIG, base_digest, config_of, put_on
from engine.storage.adapter_reader import base_name, is_adapter, load_adapter, read_leaves
from engine.storage.assets import ASSETS, HUB_IDS, MODELS, RECOMMENDED_SAMPLING, fetch
from engine.storage.gguf_parts import without_part
from engine.storage.hub import cached_id, is_hub_name
from engine.storage.huggingface import load_tokenizer
from engine.storage.run_weights import PACKED, TRAINED_BLOCKS, check_arrays, check_factors
from engine.storage.tensor_layout import (
    StoredModel,
    block_leaves,
    file_kinds,
    leaf_structs,
    read_leaf,
    read_params,
)
from engine.text import OnProgress
from engine.text.tokenizer import Tokenizer

FORMS = (
    "a run folder, a step folder in it (runs/NAME/checkpoints/STEP), a Hugging Face folder, "
    "a .gguf file or the first of its parts, an adapter's folder in PEFT's layout, "
    "ORG/NAME, ORG/NAME@REVISION, ORG/NAME:QUANTISATION or ORG/NAME/FILE.gguf on the Hugging Face hub, or "
    + " or ".join(MODELS)
)
MAX_STEP = 10**18  # which no run reaches; a longer number is no name of a folder


OnConfig = Callable[[ModelConfig], None]
OnBlocks = Callable[[dict[str, Blocks]], None]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model's weights, architecture and tokenizer."""

    name: str
    cfg: ModelConfig
    params: Any  # matrices in the dtype asked for, float32 of a run; gains and biases in float32
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]  # each ends a completion; the tokenizer's own is the first
    checkpoint: Path  # the file or folder that was read
    run: Path | None = None  # its run folder
    hub_id: str = ""  # of the model, or of an adapter's base; empty when unknown
    notes: tuple[str, ...] = ()  # lines to print
    # recommended, by the names of SamplingParams; unchecked
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bases: tuple[Path, ...] = ()  # of the models below an adapter
    # paths of weights that PEFT's layout cannot hold: with a DoRA in them, or trained whole
    merged: tuple[str, ...] = ()
    # of a GGUF file's matrices as they lie there, by path, for `describe_kinds`
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} ({self.checkpoint})"


class ReadWeights(NamedTuple):
    """Weights that were read."""

    params: Any
    checkpoint: Path  # that they were read from
    notes: tuple[str, ...] = ()  # to print
    merged: tuple[str, ...] = ()  # as of LoadedModel


class ReadAdapter(NamedTuple):
    """An adapter that was read, as `load_adapter` returns it."""

    adapter: Any
    path: Path  # that it was read from
    notes: tuple[str, ...]  # to print


class UnreadModel(NamedTuple):
    """A model that was found, and whose headers were checked. No weight of it is read yet."""

    cfg: ModelConfig
    blocks: dict[str, Blocks]  # the shapes of leaves that stay in blocks, by path
    shapes: Callable[[], Any]  # returns the params without adapters, with shapes in place of arrays
    describe: Callable[[], LoadedModel]  # reads the tokenizer; `params` are None
    # Reads the weights. Raises UserError when they exceed the memory.
    read: Callable[[OnProgress], ReadWeights]


class Location(NamedTuple):
    """A model's format and path. An adapter without a `run` folder is in PEFT's layout. `notes`:
    why this run.
    """

    format: Literal["gguf", "hugging face", "run", "adapter"]
    path: Path
    run: Path | None = None
    notes: tuple[str, ...] = ()


def model_name(model: str) -> str:
    """Returns the name of what `--model` names, by its path alone."""
    path = Path(os.path.expanduser(model))
    if not path.exists() and is_hub_name(model):
        return model.partition("@")[0].partition("/")[2]
    gguf_name = hub.split_gguf_name(model)
    if not path.exists() and gguf_name:
        return gguf_name[0].partition("/")[2]
    if model in MODELS:
        return model
    path = path.resolve()
    if path.parent.name == "checkpoints":
        path = path.parents[1]
    return cached_id(path).partition("/")[2] or without_part(path.name)


def locate(
    name: str | None,
    report: OnProgress = None,
    cached_only: bool = False,
    on_config: OnConfig = lambda cfg: None,
) -> Location:
    """Returns the location of the model `--model` names, by default the newest finished run.

    Fetches a named asset (`report`: bytes done and in all), and a model on the Hugging Face hub
    unless `cached_only`; `on_config` gets its architecture before the weights are fetched. A named
    asset comes before a path of its name, and an existing path before the hub. Nothing in runs/ is
    fetched.
    """
    if not name:
        newest, notes = run_folder.newest_run()
        return _locate_run(newest, str(newest), notes)
    if name in MODELS:
        return Location("gguf", fetch(name, report)["model"])
    path = Path(os.path.expanduser(name))
    is_below_runs = path.parts[:1] == (str(run_folder.RUNS),)  # nothing there is fetched

    def check_config(folder: Path) -> None:
        on_config(_reader(folder).read_config(folder))

    if not path.exists() and is_hub_name(name) and not is_below_runs:
        local = hub.fetch(name, cached_only, check_config, report)
        if local.suffix == ".gguf":
            return Location("gguf", local)
        return Location("hugging face", local)
    if path.suffix == ".gguf" and path.is_file():
        return Location("gguf", path)
    gguf_name = hub.split_gguf_name(str(name))
    if gguf_name and not is_below_runs and not Path(path.parts[0]).exists():
        return Location("gguf", hub.fetch_gguf(name, *gguf_name, cached_only, report))
    is_run = (path / "run.json").exists()
    if not is_run and (path / "config.json").is_file():
        return Location("hugging face", path)
    if not is_run and is_adapter(path) and not _is_step_of_run(path):
        return Location("adapter", path)
    return _locate_run(path, name, ())


def _locate_run(path: Path, name: str, notes: tuple[str, ...]) -> Location:
    """Returns the location of a run, or of one of its steps, at `path`, which was named `name`."""
    run = _run_of(path, name)
    notes += run_folder.verify(run)
    record = run_folder.read_json(run / "run.json")
    if path == run:
        best_step = _best_step(run, record)
        if best_step is not None:
            path = run / "checkpoints" / str(best_step)
            notes += (f"its step {best_step:,} is loaded, the best by its validation",)
    if record.get("kind") == "adapter":
        return Location("adapter", path, run, notes)
    return Location("run", path, run, notes)


def _best_step(run: Path, record: dict[str, Any]) -> int | None:
    """Returns the step that a finished run's record names as the best; None where it names none."""
    result = record.get("result") or {}
    if isinstance(result, dict):
        step = result.get("kept_step")
        if step is None or (type(step) is int and 0 <= step < MAX_STEP):
            return step
    record_path = run / "run.json"
    raise UserError(
        f"{record_path} does not say which step of the run is its best: "
        "restore it from a copy, or train anew."
    )


def _is_step_of_run(path: Path) -> bool:
    folder = path.absolute()
    return folder.parent.name == "checkpoints" and (folder.parents[1] / "run.json").exists()


def _run_of(path: Path, name: str) -> Path:
    if (path / "run.json").exists():
        if (path / "checkpoints").is_dir():
            return path
        raise UserError(f"{path} has no checkpoint yet: its run was stopped before the first one was saved.")
    for step in (path, path.absolute()):
        if step.is_dir() and step.parent.name == "checkpoints":
            return step.parents[1]
    if name in ASSETS:
        raise UserError(f"{name} is a text, not a model; a model is {FORMS}.")
    if path.exists():
        raise UserError(f"{path} holds no model that is known here; a model is {FORMS}.")
    raise UserError(f"There is no model at {path}; a model is {FORMS}.{did_you_mean(name, MODELS)}")


def load_model(
    name: str | None,
    *,
    dtype: str | None = None,
    report: OnProgress = None,
    on_config: OnConfig = lambda cfg: None,
    keep_kinds: Collection[str] = (),
    on_blocks: OnBlocks = lambda blocks: None,
) -> LoadedModel:
    """Loads the model `--model` names, by default the newest finished run; a LoRA run with its
    adapter on its base.

    Other arguments are those of `peek_model`. `on_blocks` gets UnreadModel.blocks, and then
    `on_config` the architecture, before tokenizer and weights are read. Raises UserError, too, when
    the weights exceed the memory.
    """
    unread = peek_model(name, dtype=dtype, report=report, keep_kinds=keep_kinds)
    on_blocks(unread.blocks)
    on_config(unread.cfg)
    model = unread.describe()
    read = unread.read(report)
    return dataclasses.replace(
        model,
        params=read.params,
        checkpoint=read.checkpoint,
        notes=model.notes + read.notes,
        merged=read.merged,
    )


def peek_model(
    name: str | None,
    *,
    dtype: str | None = None,
    report: OnProgress = None,
    adapted_by: tuple[Path, ...] = (),
    keep_kinds: Collection[str] = (),
) -> UnreadModel:
    """Finds the model `--model` names, as `load_model`, and reads no weight but an adapter's.

    `dtype`: of the matrices of a model that is no run, by default its compute dtype. `report`:
    bytes or numbers done and in all. `adapted_by`: the LoRA runs on this base, which is then not
    fetched from the hub, as nobody named it. `keep_kinds`: matrices that a GGUF file or a run
    holds in blocks of these kinds stay Blocks.
    """

    def check_fetched(cfg: ModelConfig) -> None:
        _check_memory(_plain_bytes(cfg, dtype or cfg.dtype), str(name), dtype or cfg.dtype)

    location = locate(name, report, bool(adapted_by), check_fetched)
    if location.format == "adapter":
        return _peek_adapted(location, adapted_by)
    if location.run:
        return _peek_run(location, location.run, keep_kinds)
    return _peek_file(str(name), location.path, dtype, keep_kinds)


def _plain_bytes(cfg: ModelConfig, dtype: str) -> int:
    """Returns the bytes of a model's weights with its matrices in `dtype`."""
    bytes_each = 4 if dtype == "float32" else 2
    return count_params(cfg).total * bytes_each


def _check_memory(size: int, model: str, dtype: str) -> None:
    """Raises UserError when weights of `size` bytes, of a model named `model`, exceed the memory.
    `dtype`: of those that are in no blocks.
    """
    subject = f"The weights of {model_name(model)} take"
    require_memory(size, subject, "choose a smaller model.", detail=f" in {dtype}")


def _peek_file(name: str, path: Path, dtype: str | None, keep_kinds: Collection[str]) -> UnreadModel:
    """Finds the model of a GGUF file or a Hugging Face folder at `path`, which `--model` named `name`.

    Other arguments are those of `peek_model`.
    """
    stored: StoredModel = _reader(path).open_model(path)
    cfg = stored.cfg
    in_memory = dtype or cfg.dtype
    blocks = block_leaves(stored, keep_kinds)

    def shapes() -> Any:
        return unflatten(leaf_structs(stored, in_memory) | blocks)

    def describe() -> LoadedModel:
        tokenizer, eos_ids, sampling = stored.read_tokenizer()
        notes = stored.notes
        if cfg.context < stored.context:
            notes += (
                "attention windows are not built here: "
                f"the context of {stored.context:,} ends with the first, of {cfg.context:,}",
            )
        return LoadedModel(
            name=name if name in HUB_IDS else stored.name,
            cfg=cfg,
            params=None,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            checkpoint=path,
            hub_id=HUB_IDS.get(name, stored.hub_id),
            notes=notes,
            sampling=RECOMMENDED_SAMPLING.get(name, sampling),
            kinds=file_kinds(stored),
        )

    def read(report: OnProgress) -> ReadWeights:
        # blocks as they lie
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes()))
        _check_memory(size, name, in_memory)
        return ReadWeights(read_params(stored, in_memory, report, blocks), path)

    return UnreadModel(cfg, blocks, shapes, describe, read)


def _peek_run(location: Location, run: Path, keep_kinds: Collection[str]) -> UnreadModel:
    """Finds the model of a run's checkpoint; arguments are those of `peek_model`."""
    cfg = run_folder.read_config(run)
    trained_blocks = run_folder.read_json(run / "run.json").get(TRAINED_BLOCKS)
    if not isinstance(trained_blocks, list):
        trained_blocks = None
    check = functools.partial(check_arrays, cfg, trained_blocks=trained_blocks)
    arrays = checkpoint_reader.peek_arrays(location.path, check)
    structs = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays.items()}
    packed = {path: struct for path, struct in structs.items() if path.startswith(PACKED)}
    planned = _with_blocks(cfg, packed)

    def in_use(leaves: dict[str, Any]) -> dict[str, Any]:
        in_memory: dict[str, Any] = {}
        for path, leaf in leaves.items():
            if isinstance(leaf, Blocks) and leaf.kind in keep_kinds:
                in_memory[path] = leaf
            else:
                in_memory[path] = to_dense(leaf)
        return unflatten(in_memory)

    def shapes() -> Any:
        return jax.eval_shape(lambda leaves: in_use(_with_blocks(cfg, leaves)), structs)

    def describe() -> LoadedModel:
        tokenizer, eos_ids, sampling = load_tokenizer(run / "tokenizer", cfg.vocab)
        return LoadedModel(
            name=model_name(str(run)),
            cfg=cfg,
            params=None,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            checkpoint=location.path,
            run=run,
            notes=location.notes,
            sampling=sampling,
        )

    def read(report: OnProgress) -> ReadWeights:
        _check_memory(_plain_bytes(cfg, "float32"), str(run), "float32")
        loaded = checkpoint_reader.load_params(location.path, check)
        leaves = _with_blocks(cfg, leaf_paths(loaded.params))
        check_factors(loaded.path, leaves)
        if _kinds(leaves) != _kinds(planned):
            raise UserError(
                f"{loaded.path} has other weights in blocks than a newer checkpoint of its run. "
                "Name the one to load."
            )
        return ReadWeights(in_use(leaves), loaded.path, _damage(loaded.path, loaded.damaged))

    blocks = {path: leaf for path, leaf in planned.items() if leaf.kind in keep_kinds}
    return UnreadModel(cfg, blocks, shapes, describe, read)


def _with_blocks(cfg: ModelConfig, leaves: dict[str, Any]) -> dict[str, Any]:
    """Makes Blocks of a checkpoint's leaves under `packed/`, with the factors that trained. Changes
    `leaves` and returns it.
    """
    for path, shape in leaf_shapes(cfg).items():
        packed = leaves.pop(PACKED + path, None)
        if packed is not None:
            axis = int(path != "embed")
            weight = Blocks(packed, shape[axis], axis)
            if path in leaves:
                leaves[path] = with_factors(weight, leaves[path])
            else:
                leaves[path] = weight
    return leaves


def _kinds(leaves: dict[str, Any]) -> dict[str, str]:
    return {path: leaf.kind for path, leaf in leaves.items() if isinstance(leaf, Blocks)}


def _damage(used: Path, damaged: list[str]) -> tuple[str, ...]:
    """Returns the notes on damaged files in checkpoints newer than the one in use."""
    if not damaged:
        return ()
    notes = [f"damaged: {line}" for line in damaged]
    return (*notes, f"using {used} instead")


def _reader(path: Path) -> ModuleType:
    if path.is_dir():
        return huggingface
    from engine.storage import gguf  # whose library no folder needs

    return gguf


def check_loads(written: Path, path: Path, report: OnProgress = None) -> None:
    """Reads all of a GGUF file or a Hugging Face folder, `written` to appear at `path`. Raises
    UserError as `load_model`.

    `report`: numbers read and in all.
    """
    remedy = ""
    remedy_of_weights = " Another type of weights may hold it."  # for they were rounded
    if path.suffix == ".gguf":
        remedy = " A Hugging Face folder may hold it."
        remedy_of_weights = " Another type of weights, or a Hugging Face folder, may hold it."
    try:
        stored: StoredModel = _reader(written).open_model(written)
        stored.read_tokenizer()
        remedy = remedy_of_weights
        done = 0
        total = sum(math.prod(leaf.stored) for leaf in stored.leaves)
        for leaf in stored.leaves:
            read_leaf(stored, leaf, stored.cfg.dtype)
            done += math.prod(leaf.stored)
            if report:
                report(done, total)
    except UserError as error:
        sentence = str(error).replace(str(written), str(path))
        raise UserError(f"Nothing was written, because it would not load again: {sentence}{remedy}") from None


def _base_of(location: Location) -> str:
    if location.run:
        return _base_of_run(location.run)
    name = base_name(location.path)
    if not name:
        raise UserError(
            f"{location.path / CONFIG} does not name the model it adapts: name that one, to chat or serve."
        )
    return name


def _peek_adapted(location: Location, adapted_by: tuple[Path, ...]) -> UnreadModel:
    """Returns an adapter on the base that it names; else as `peek_model`."""
    folder = location.run or location.path
    name = _base_of(location)
    if folder.resolve() in adapted_by:
        raise UserError(
            f"{folder} is named as a base of itself. Restore its record from a copy, or train anew."
        )
    with _reading_base(folder, name):
        base = peek_model(name, adapted_by=(*adapted_by, folder.resolve()))

    def describe() -> LoadedModel:
        with _reading_base(folder, name):
            model = base.describe()
        tokenizer = model.tokenizer
        eos_ids = model.eos_ids
        if location.run:
            tokenizer, eos_ids, _ = load_tokenizer(folder / "tokenizer", base.cfg.vocab)
        elif (folder / "tokenizer.json").is_file():  # with the chat template that it was tuned by
            tokenizer, eos_ids, _ = load_tokenizer(folder, base.cfg.vocab)
        return dataclasses.replace(
            model,
            name=model_name(str(folder)),
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            checkpoint=location.path,
            run=location.run,
            notes=location.notes + model.notes,
            bases=(*model.bases, model.run or model.checkpoint),
        )

    def read(report: OnProgress) -> ReadWeights:
        with _reading_base(folder, name):
            below = base.read(None)
        digest_base = functools.partial(base_digest, below.params)
        own = _read_located_adapter(base.cfg, location, digest_base)
        whole = [path for path, leaf in leaf_paths(own.adapter).items() if not isinstance(leaf, LoRA)]
        params = _apply_adapter(below.params, own.adapter, own.path)
        return ReadWeights(params, own.path, notes=below.notes + own.notes, merged=(*below.merged, *whole))

    return UnreadModel(base.cfg, {}, base.shapes, describe, read)


@contextlib.contextmanager
def _reading_base(folder: Path, name: str) -> Iterator[None]:
    """Names in a UserError the adapter in `folder`, which needs the base of this name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder} adapts {name}, which cannot be read: {error}") from None


def _base_of_run(run: Path) -> str:
    match run_folder.read_json(run / "run.json"):
        case {"base": {"model": str(name)}}:
            return name
    raise UserError(
        f"{run / 'run.json'} does not say which model it adapts: restore it from a copy, or train anew."
    )


def adapter_origin(name: str, cfg: ModelConfig) -> tuple[str, LoraConfig | None] | None:
    """Returns the base that an adapter names, of a LoRA run or in PEFT's layout, and its
    LoraConfig, None where none describes it; None for any other model.
    """
    if not Path(name).expanduser().exists():
        return None
    location = locate(name)
    if location.format != "adapter":
        return None
    adapter = _read_located_adapter(cfg, location).adapter
    return _base_of(location), config_of(cfg, leaf_paths(adapter))


def with_adapters(cfg: ModelConfig, params: Any, folders: Sequence[Path]) -> tuple[Any, tuple[str, ...]]:
    """Returns params with the LoRA adapters in `folders` applied, and notes to print.

    A folder is in PEFT's layout, a LoRA run's, or one of its step folders. Several adapters add up.
    Raises UserError for one trained on other weights (by their digest).
    """
    adapted = params
    notes = tuple[str, ...]()
    for folder in folders:
        own = read_adapter(cfg, folder, functools.partial(base_digest, params))
        adapted = _apply_adapter(adapted, own.adapter, own.path)
        notes = notes + own.notes
    return adapted, notes


def read_adapter(cfg: ModelConfig, folder: Path, digest_base: Callable[[], str]) -> ReadAdapter:
    """Reads an adapter from a folder as of `with_adapters`."""
    location = _locate_adapter(folder)
    own = _read_located_adapter(cfg, location, digest_base)
    return own._replace(notes=location.notes + own.notes)


def _locate_adapter(folder: Path) -> Location:
    """Returns the location of an adapter that a run trained; any other folder as one in PEFT's layout."""
    if any((folder / name).exists() for name in ("run.json", "state.json")):
        location = locate(str(folder))
        if location.format == "adapter":
            return location
    return Location("adapter", folder)


def _read_located_adapter(
    cfg: ModelConfig, location: Location, digest_base: Callable[[], str] | None = None
) -> ReadAdapter:
    folder = location.path
    if location.run:
        checkpoint, damaged = checkpoint_reader.find_intact(folder)
        checkpoint_reader.check_is_adapter(checkpoint)
        leaves = read_leaves(checkpoint, cfg, digest_base)
        return ReadAdapter(leaves, checkpoint, _damage(checkpoint, damaged))
    notes: tuple[str, ...] = ()
    if not (folder / manifest.NAME).exists():
        notes = (
            f"{folder} has no {manifest.NAME}, as other programs' adapters: "
            "a change of its weights goes unnoticed",
        )
    return ReadAdapter(load_adapter(folder, cfg, digest_base), folder, notes)


def _apply_adapter(params: Any, adapter: Any, path: Path) -> Any:
    try:
        return put_on(params, adapter)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None

"""What fine-tuning and reinforcement learning share: opens a model, splits its parameters, saves some.

opened = open_model(...)                                   configuration and tokenizer; no weight is read
prepared = PreparedModel.load(planned, console, advice)    trainable and frozen parameters
"""

import copy
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from engine.counting.params import count_params, count_trainable
from engine.device import host_memory
from engine.errors import UserError
from engine.mesh.layout import place
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import leaf_paths, map_paths, merge, split, unflatten
from engine.model.trainable import TrainablePaths, lora_only
from engine.model.weights.block_layout import ROUNDED
from engine.model.weights.blocks import Blocks
from engine.model.weights.convert import cast_matrices, describe_weights, round_while_training
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import init_lora, merge_lora
from engine.storage.adapter import SavedAdapter, base_digest
from engine.storage.adapter_reader import read_leaves
from engine.storage.adapter_writer import saved_run_adapter
from engine.storage.checkpoint_reader import find_intact, load_params
from engine.storage.digest import digest
from engine.storage.hub import gguf_name
from engine.storage.kinds_in_words import describe_kinds
from engine.storage.model_loader import LoadedModel, UnreadModel, adapter_origin, model_name, peek_model
from engine.storage.run_weights import TRAINED_BLOCKS, check_arrays
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.tokenizer import Tokenizer
from engine.training.freeze import select_trainable
from engine.training.optimizer import make_optimizer
from engine.training.step import Objective, TrainState, init_state
from stages.cli.console import Console
from stages.runs.flags import TrainableFlags
from stages.runs.plan import RunPlan
from stages.runs.stage import Plan, Prepared

Rows = list[tuple[str, str]]  # of a banner


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that is to be trained: its configuration, tokenizer and template, and what of it is
    trained."""

    name: str  # as --model names it
    folder: Path  # of the run
    on_mesh: bool
    model: LoadedModel  # without its parameters
    unread: UnreadModel
    in_blocks: bool  # whether steps read all weights as `serve --weights q4` does
    # paths of the weights that are loaded in blocks: of these the factors train
    blocks: Collection[str]
    lora: LoraConfig | None  # the adapter that is trained
    continued_base: str  # the base of the adapter that is continued, "" for a new one
    chat: ChatTokenizer
    tokenizer: Tokenizer  # with the chat's template, to be saved with the run
    stop_token_ids: tuple[int, ...]  # all ids that end a completion


def open_model(
    name: str,
    options: TrainableFlags,
    folder: Path,
    console: Console,
    template: str | None = None,
    on_mesh: bool = False,
) -> OpenedModel:
    """Opens a model to train; reads no weights.

    Raises UserError for a folder in which the model itself lies.
    """
    in_blocks = options.weights == "q4"
    dtype = None if options.adapter else "float32"
    with console.task(f"loading {name}") as report:
        unread = peek_model(name, dtype=dtype, report=report, keep_kinds=ROUNDED if in_blocks else ())
        model = unread.describe()
    _refuse_own_folder(model, folder)
    adapter = _choose_adapter(name, model.cfg, options, console)
    console.print_notes(*model.notes)
    chat = ChatTokenizer(model.tokenizer, template)
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.config = tokenizer.config | {"chat_template": chat.source}
    return OpenedModel(
        name=name,
        folder=folder,
        on_mesh=on_mesh,
        model=model,
        unread=unread,
        in_blocks=in_blocks,
        blocks=unread.blocks,
        lora=adapter.lora,
        continued_base=adapter.continued_base,
        chat=chat,
        tokenizer=tokenizer,
        stop_token_ids=tuple(dict.fromkeys((*model.eos_ids, *chat.eot_ids))),
    )


class ChosenAdapter(NamedTuple):
    """The adapter that is trained; the fields are those of OpenedModel."""

    lora: LoraConfig | None
    continued_base: str


def _choose_adapter(name: str, cfg: ModelConfig, options: TrainableFlags, console: Console) -> ChosenAdapter:
    """Returns the model's own adapter, if it is one that can be continued, or else a new one, and
    prints which.

    The model is not asked for its own where --lora gives a new one, or weights themselves are
    trained.
    """
    if options.lora or not options.adapter:
        return ChosenAdapter(options.adapter, continued_base="")
    base, continued = adapter_origin(name, cfg) or ("", None)
    if continued:
        console.print_notes(f"The adapter {name} is continued, on its base {base}.")
        return ChosenAdapter(continued, continued_base=base)
    if base:
        console.print_notes(
            f"A new adapter is trained on {name}, which stays as it is: "
            "it has several ranks or scales, a DoRA, or weights trained whole, and cannot be continued."
        )
    return ChosenAdapter(options.adapter, continued_base="")


def _refuse_own_folder(model: LoadedModel, folder: Path) -> None:
    for path in (model.checkpoint, *model.bases):
        if not path.resolve().is_relative_to(folder.resolve()):
            continue
        owner = "the model itself"
        if path is not model.checkpoint:
            owner = f"the base that {model.run or model.checkpoint} adapts"
        raise UserError(
            f"{folder} is the run of {owner}, which would be overwritten. Give another --out-dir."
        )


def model_rows(opened: OpenedModel, plan: RunPlan, trained_numbers: int = 0) -> Rows:
    """Returns the banner's rows of a model. `trained_numbers`: those of weights in blocks, 0 where
    they are not known."""
    cfg = plan.cfg
    dtype: str = cfg.dtype
    shapes = opened.unread.shapes()
    if plan.base == "int8":
        dtype = "int8"
        shapes = jax.eval_shape(lambda params: quantize(params, "full"), shapes)
    size = f"{count_params(cfg).total:,} parameters, {dtype}"
    if opened.in_blocks:
        size += ", in 4 bits as served"
        if trained_numbers:
            size += f", of which {trained_numbers:,} numbers train"
    return [
        ("model", f"{plan.name}: {cfg.layers} layers, width {cfg.width}, {size}"),
        ("weights", describe_weights(shapes)),
        ("file", describe_kinds(opened.model.kinds, shapes)),
    ]


class SplitWeights(NamedTuple):
    """The parameters of a run: in float32 what trains, in the compute type or int8 what does not,
    as steps read them."""

    trainable: Any
    frozen: Any
    # What a checkpoint holds beside what trains; None for an adapter, of which nothing else is saved.
    frozen_as_loaded: Any
    params: Any  # as loaded; None where they were freed
    # the model's entries of run.json, with the digest of all parameters as loaded
    metadata: dict[str, Any]


def load_weights(opened: OpenedModel, plan: RunPlan, console: Console) -> SplitWeights:
    """Reads the parameters of an opened model, and splits them."""
    with console.task(f"loading {opened.name}") as report, host_memory(opened.on_mesh):
        read = opened.unread.read(report)
    console.print_notes(*read.notes)
    params = read.params
    with host_memory(opened.on_mesh):  # changes no array of `params`
        if opened.lora:
            weights = _split_for_adapter(opened, opened.lora, plan, params)
        else:
            weights = _split_by_paths(opened, plan, params)
    metadata = {
        "kind": "adapter" if opened.lora else "model",
        "lora": dataclasses.asdict(opened.lora) if opened.lora else None,
        "base": _describe_base(opened, base_digest(weights.params)),
        "tokenizer": {"kind": "the model's", "digest": opened.model.tokenizer.digest},
        **weights.metadata,
    }
    if plan.base == "int8":
        weights = weights._replace(params=None)  # the float ones are freed
    return weights._replace(metadata=metadata)


def _split_for_adapter(opened: OpenedModel, lora: LoraConfig, plan: RunPlan, params: Any) -> SplitWeights:
    metadata = {}
    trainable = init_lora(plan.cfg, jax.random.key(plan.seed), lora)
    if opened.continued_base:
        assert plan.trainable is not None
        adapted = plan.trainable.adapted
        loaded = leaf_paths(params)
        trainable = unflatten(
            {path: dataclasses.replace(loaded[path], base=None) for path in sorted(adapted)}
        )
        params = map_paths(lambda path, leaf: leaf.base if path in adapted else leaf, params)
        metadata["continues"] = digest(trainable, scales=False)  # `lora` tells them
    base = params
    if plan.base == "int8":
        base = quantize(params, "full")
    return SplitWeights(trainable, cast_matrices(base, plan.cfg.dtype), None, params, metadata)


def _split_by_paths(opened: OpenedModel, plan: RunPlan, params: Any) -> SplitWeights:
    assert plan.trainable is not None
    metadata = {}
    trainable, frozen = split(merge_lora(params), plan.trainable.weights)
    # A checkpoint holds blocks as they are, under `packed/`, beside what trains of them.
    as_loaded = {path: leaf for path, leaf in leaf_paths(frozen).items() if not isinstance(leaf, Blocks)}
    for path, leaf in leaf_paths(params).items():
        if isinstance(leaf, Blocks):
            as_loaded[f"packed/{path}"] = leaf.packed
    if opened.in_blocks:
        metadata[TRAINED_BLOCKS] = [
            path for path, leaf in leaf_paths(trainable).items() if isinstance(leaf, Blocks)
        ]
        trainable, frozen = round_while_training(trainable, frozen)
    trainable = cast_matrices(trainable, "float32")
    frozen = cast_matrices(frozen, plan.cfg.dtype)
    return SplitWeights(trainable, frozen, unflatten(as_loaded), params, metadata)


def _describe_base(opened: OpenedModel, digest_of_base: str) -> dict[str, str]:
    """Returns run.json's `base`: by what name it is found again, its digest, and what it is called."""
    source = opened.name
    name = opened.model.name
    revision = opened.model.checkpoint
    if opened.continued_base:
        source = opened.continued_base
        name = model_name(source)
        revision = opened.model.bases[-1]
    path = Path(source).expanduser()
    if path.exists():
        source = str(path.absolute())
    elif "/" in source:  # on the hub: a file there, or a repository at the commit that was loaded
        source = gguf_name(revision) or f"{opened.model.hub_id}@{revision.name}"
    return {"model": source, "digest": digest_of_base, "name": name}


class ModelPlan(Plan, Protocol):
    """The plan of a stage that trains an opened model."""

    @property
    def opened(self) -> OpenedModel: ...

    @property
    def metadata(self) -> dict[str, Any]:
        """The stage's own entries of run.json, but for those of `load_weights`."""

    @property
    def objective(self) -> Objective: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedModel[P: ModelPlan](Prepared):
    """A Prepared run that trains the opened model of the stage's plan. `plan` is that of `planned`."""

    planned: P
    params: Any  # as loaded, None where they were freed

    @classmethod
    def load(cls, planned: P, console: Console, advice: str) -> Self:
        """Reads the weights of the plan's model. `advice`: see Prepared."""
        opened = planned.opened
        weights = load_weights(opened, planned.plan, console)
        return cls(
            plan=planned.plan,
            metadata={**weights.metadata, **planned.metadata},
            advice=advice,
            tokenizer=opened.tokenizer,
            stop_token_ids=opened.stop_token_ids,
            sampling=opened.model.sampling,
            trainable=weights.trainable,
            frozen=weights.frozen,
            frozen_as_loaded=weights.frozen_as_loaded,
            objective=planned.objective,
            planned=planned,
            params=weights.params,
        )

    @property
    def opened(self) -> OpenedModel:
        return self.planned.opened

    def with_plan(self, planned: P) -> Self:
        """Returns it with another plan of the same model."""
        return dataclasses.replace(self, planned=planned, plan=planned.plan)

    def count_trained_numbers(self) -> int:
        """Returns how many numbers train; weights in blocks have fewer of them than parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trainable))

    def placed(self) -> Self:
        if not self.opened.on_mesh:
            return self
        return dataclasses.replace(  # the host keeps what was loaded
            self,
            trainable=place(self.trainable),
            frozen=place(self.frozen),
            frozen_as_loaded=jax.device_get(self.frozen_as_loaded),
            params=jax.device_get(self.params),
        )

    def to_saved(self, trainable: Any) -> Any:
        if self.opened.lora:
            return trainable
        return merge(trainable, self.frozen_as_loaded)

    def from_saved(self, params: Any) -> Any:
        if self.opened.lora or self.plan.trainable is None:
            return params
        return split(params, self.plan.trainable.weights)[0]

    def initial_params(self) -> Any:
        """Returns the model before training: an untrained adapter changes nothing, to the bit."""
        if self.opened.lora and not self.opened.continued_base:
            return self.frozen
        return merge(self.trainable, self.frozen)

    def initial_state(self, trainable: Any) -> TrainState:
        """Copies `trainable`: steps donate the state, and the report compares with the start."""
        return init_state(make_optimizer(self.plan.recipe.optimizer), jax.tree.map(jnp.copy, trainable))

    @property
    def adapted(self) -> SavedAdapter | None:
        if not self.opened.lora:
            return None
        base = self.metadata["base"]
        name = base["model"]
        if not Path(name).exists():  # on the hub, where no revision is part of a name
            name = name.partition("@")[0]
        return saved_run_adapter(self.opened.lora, base=base["digest"], base_name=name)

    def checkpoint(self, step: int) -> Path:
        """Returns the folder in which the trained parameters of a step are."""
        return self.opened.folder / "checkpoints" / str(step)

    def load_trained(self, step: int) -> Any:
        """Returns the trainable parameters of a checkpoint."""
        checkpoint = self.checkpoint(step)
        if self.opened.lora:
            intact, _ = find_intact(checkpoint)
            return place(read_leaves(intact, self.plan.cfg))
        trained_blocks = self.metadata.get(TRAINED_BLOCKS)
        check = functools.partial(check_arrays, self.plan.cfg, trained_blocks=trained_blocks)
        return place(self.from_saved(load_params(checkpoint, check).params))

    def check_frozen(self) -> None:
        """Raises RuntimeError when the digest of an adapter's base has changed; a base in int8 is
        gone by now and not checked."""
        if not self.opened.lora or self.params is None:
            return
        base = self.metadata["base"]
        if base["digest"] != base_digest(self.params):
            raise RuntimeError(f"Frozen weights changed: their SHA-256 was {base['digest']}.")


def choose_trainable(
    cfg: ModelConfig, lora: LoraConfig | None, train: Sequence[str], freeze: Sequence[str]
) -> tuple[TrainablePaths, Rows]:
    """Returns the trainable paths, and rows with what each rule matched. Raises UserError for a
    rule that matches nothing."""
    if lora:
        trainable = lora_only(cfg, lora)
        return trainable, _adapter_rows(cfg, lora, trainable)
    rules: Sequence[str] = train
    if train == ("all",):
        rules = []
    trainable, matches = select_trainable(cfg, rules, freeze)
    return trainable, _match_rows(cfg, trainable, matches)


def _adapter_rows(cfg: ModelConfig, lora: LoraConfig, trainable: TrainablePaths) -> Rows:
    total = count_params(cfg).total
    count = count_trainable(cfg, trainable)
    return [
        ("LoRA", f"{', '.join(lora.adapted_matrices)} of {cfg.layers} layers, rank {lora.rank}"),
        ("trainable", f"{count:,} parameters beside {total:,} frozen ones ({count / total:.1%})"),
    ]


def _match_rows(cfg: ModelConfig, trainable: TrainablePaths, matches: Mapping[str, Collection[str]]) -> Rows:
    """Returns a row for each rule, with the leaves that it matched, and one for all that trains."""
    total = count_params(cfg).total
    rows = []
    for rule, paths in matches.items():
        leaves = "leaf" if len(paths) == 1 else "leaves"
        count = count_trainable(cfg, TrainablePaths(frozenset(paths)))
        rows.append((rule, f"{len(paths)} {leaves}, {count:,} parameters"))
    count = count_trainable(cfg, TrainablePaths(trainable.weights))
    rows.append(("trainable", f"{count:,} of {total:,} parameters ({count / total:.1%})"))
    return rows

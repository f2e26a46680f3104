"""ModelStage: loads a model, splits it into trainable and frozen parameters, and saves the trained ones.

Fine-tuning and reinforcement learning are such stages.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from engine.counting.params import TrainablePaths, count_params, count_trainable, lora_only
from engine.device import host_memory
from engine.errors import UserError
from engine.mesh import processes
from engine.mesh.layout import place
from engine.model.config import LoraConfig, ModelConfig
from engine.model.paths import leaf_paths, map_paths, merge, split, unflatten
from engine.model.weights.blocks import Blocks
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import init_lora, innermost_base, merge_lora
from engine.model.weights.matmul import cast_matrices, round_while_training
from engine.storage.adapter import base_digest, build_adapter, save_adapter
from engine.storage.checkpoint_reader import load_params
from engine.storage.digest import digest
from engine.storage.model_loader import adapter_origin, load_model, model_name
from engine.storage.run_folder import ADAPTER
from engine.storage.run_weights import TRAINED_BLOCKS, check_arrays
from engine.storage.tensor_layout import describe_kinds
from engine.text.chat_tokenizer import ChatTokenizer
from engine.training.freeze import select_trainable
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state
from stages.cli.console import Console
from stages.runs.flags import TrainableFlags
from stages.runs.mesh import on_one_device
from stages.runs.stage import Stage


class ModelStage(Stage):
    """A Stage that trains a loaded model. The subclass sets `plan`, and `metadata` to its own entries of run.json.

    `trainable` is in float32, `frozen` in the compute type or int8, as steps read it; of a LoRA nothing else is saved.
    `in_blocks`: whether steps read all weights as `serve --weights q4` does. Of Blocks that are loaded, whose shapes are
    `blocks`, and which are saved under `packed/`, the factors train; other weights are saved as they are.
    """

    metadata: dict[str, Any]
    continued_base = ""  # of the adapter that is continued

    def __init__(
        self,
        name: str,
        options: TrainableFlags,
        folder: Path,
        console: Console,
        template: str | None = None,
        on_config: Callable[[ModelConfig], None] = lambda cfg: None,
        on_mesh: bool = False,
    ) -> None:
        self.name, self.folder, self.console, self.on_mesh = name, folder, console, on_mesh
        self.lora, self.in_blocks, self.blocks = options.adapter, options.weights == "q4", dict[str, Any]()

        def choose_adapter(cfg: ModelConfig) -> None:
            if self.lora and not options.lora:
                self._continue_adapter(cfg)
            on_config(cfg)

        with console.task(f"loading {name}") as report, host_memory(on_mesh):
            dtype, blocks = None if self.lora else "float32", self.blocks if self.in_blocks else None
            self.model = load_model(name, dtype=dtype, report=report, on_config=choose_adapter, blocks=blocks)
        without_adapters = lambda params: map_paths(lambda _, leaf: innermost_base(leaf), params)
        self.loaded_shapes = jax.eval_shape(without_adapters, self.model.params)  # for the banner, when the weights are gone
        checkpoint = self.model.checkpoint
        for path in (checkpoint, *self.model.bases):
            if path.resolve().is_relative_to(folder.resolve()):
                is_own, adapted = path is checkpoint, self.model.run or checkpoint
                owner = "the model itself" if is_own else f"the base that {adapted} adapts"
                raise UserError(f"{folder} is the run of {owner}, which would be overwritten. Give another --out-dir.")
        console.print_notes(*self.model.notes)
        # Saved with the run: the chat's template, and all ids that end a completion.
        self.chat = ChatTokenizer(self.model.tokenizer, template)
        self.tokenizer = copy.copy(self.model.tokenizer)
        self.tokenizer.config = self.tokenizer.config | {"chat_template": self.chat.source}
        self.sampling = self.model.sampling
        self.stop_token_ids = tuple(dict.fromkeys((*self.model.eos_ids, *self.chat.eot_ids)))

    def _continue_adapter(self, cfg: ModelConfig) -> None:
        """Has the run continue the LoRA that the model is, if it is one, in place of a new one."""
        base, config = adapter_origin(self.name, cfg) or ("", None)
        if config:
            self.continued_base, self.lora = base, config
            self.console.print_notes(f"The adapter {self.name} is continued, on its base {base}.")
        elif base:
            self.console.print_notes(
                f"A new adapter is trained on {self.name}, which stays as it is: it has several ranks or scales, a DoRA, "
                "or weights trained whole, and cannot be continued."
            )

    def load_weights(self) -> None:
        """Splits the parameters, and adds the digest of all, as loaded, to the metadata."""
        params, plan = self.model.params, self.plan
        assert plan.trainable is not None
        with host_memory(self.on_mesh):  # changes no array of `params`
            if self.lora:
                self.trainable = init_lora(plan.cfg, jax.random.key(plan.seed), self.lora)
                if self.continued_base:
                    adapted, loaded = plan.trainable.adapted, leaf_paths(params)
                    self.trainable = unflatten({path: dataclasses.replace(loaded[path], base=None) for path in sorted(adapted)})
                    params = map_paths(lambda path, leaf: leaf.base if path in adapted else leaf, params)
                    self.model = dataclasses.replace(self.model, params=params)
                base = params if plan.base == "float" else quantize(params, "full")
                self.frozen = cast_matrices(base, plan.cfg.dtype)
            else:
                trainable, frozen = split(merge_lora(params), plan.trainable.weights)
                packed = {f"packed/{at}": leaf.packed for at, leaf in leaf_paths(params).items() if isinstance(leaf, Blocks)}
                others = {at: leaf for at, leaf in leaf_paths(frozen).items() if not isinstance(leaf, Blocks)}
                self.frozen_as_loaded = unflatten(others | packed)
                if self.in_blocks:
                    in_blocks = [path for path, leaf in leaf_paths(trainable).items() if isinstance(leaf, Blocks)]
                    self.metadata[TRAINED_BLOCKS] = in_blocks
                    trainable, frozen = round_while_training(trainable, frozen)
                self.trainable, self.frozen = cast_matrices(trainable, "float32"), cast_matrices(frozen, plan.cfg.dtype)
        source, name, revision = self.name, self.model.name, self.model.checkpoint
        if self.continued_base:
            source, name, revision = self.continued_base, model_name(self.continued_base), self.model.bases[-1]
            self.metadata["continues"] = digest(self.trainable, scales=False)  # `learns` tells them
        path = Path(source).expanduser()
        if path.exists():  # absolute, to be found again
            source = str(path.absolute())
        elif "/" in source:  # on the hub, at the commit that was loaded
            source = f"{self.model.hub_id}@{revision.name}"
        self.metadata = {
            "kind": "adapter" if self.lora else "model",
            "base": {"model": source, "digest": base_digest(params), "name": name},
            "tokenizer": {"kind": "the model's", "digest": self.model.tokenizer.digest},
            **self.metadata,
        }
        if plan.base == "int8":
            self.model = dataclasses.replace(self.model, params=None)  # frees the float weights

    def place(self) -> None:
        if self.on_mesh:  # the host keeps what was loaded
            self.trainable, self.frozen = place(self.trainable), place(self.frozen)
            self.frozen_as_loaded = jax.device_get(self.frozen_as_loaded)
            self.model = dataclasses.replace(self.model, params=jax.device_get(self.model.params))

    def to_saved(self, trainable: Any) -> Any:
        return trainable if self.lora else merge(trainable, self.frozen_as_loaded)

    def from_saved(self, params: Any) -> Any:
        return params if self.lora or self.plan.trainable is None else split(params, self.plan.trainable.weights)[0]

    def initial_params(self) -> Any:
        """Returns the model before training: an untrained adapter changes nothing, to the bit."""
        return self.frozen if self.lora and not self.continued_base else merge(self.trainable, self.frozen)

    def initial_state(self, trainable: Any) -> TrainState:
        """Copies `trainable`: steps donate the state, and the report compares with the start."""
        return init_state(make_optimizer(self.plan.recipe.optimizer), jax.tree.map(jnp.copy, trainable))

    def model_rows(self) -> list[tuple[str, str]]:
        plan, cfg = self.plan, self.plan.cfg
        size = f"{count_params(cfg).total:,} parameters, {'int8' if plan.base == 'int8' else cfg.dtype}"
        if self.in_blocks:
            numbers = sum(leaf.size for leaf in jax.tree.leaves(self.trainable))  # 0 in a dry run
            size += ", in 4 bits as served" + f", of which {numbers:,} numbers train" * bool(numbers)
        shapes = self.loaded_shapes
        if plan.base == "int8":
            shapes = jax.eval_shape(lambda params: quantize(params, "full"), shapes)
        return [
            ("model", f"{plan.name}: {cfg.layers} layers, width {cfg.width}, {size}"),
            ("file", describe_kinds(self.model.kinds, shapes)),
        ]

    def load_trained(self, step: int) -> Any:
        trained_blocks = self.metadata.get(TRAINED_BLOCKS)
        check = functools.partial(check_arrays, self.plan.cfg, lora=self.lora, trained_blocks=trained_blocks)
        params = load_params(self.folder / "checkpoints" / str(step), check).params
        return place(build_adapter(self.lora, params) if self.lora else self.from_saved(params))

    def save_trained(self, step: int, trainable: Any) -> Path:
        """Saves an adapter, if one was trained, beside the checkpoints. Returns where the trained parameters are.

        Raises RuntimeError when the digest of the base has changed; one in int8 is gone by now and not checked.
        """
        self.chat.close()
        if not self.lora:
            return self.folder / "checkpoints" / str(step)
        base, params = self.metadata["base"], self.model.params
        if params is not None and base["digest"] != base_digest(params):
            raise RuntimeError(f"Frozen weights changed: their SHA-256 was {base['digest']}.")
        with on_one_device(trainable) as whole:
            if processes.is_first():
                name = base["model"] if Path(base["model"]).exists() else base["model"].partition("@")[0]
                save_adapter(self.folder / ADAPTER, self.plan.cfg, whole, base=base["digest"], base_name=name)
        return self.folder / ADAPTER


def choose_trainable(
    cfg: ModelConfig, lora: LoraConfig | None, train: Sequence[str], freeze: Sequence[str]
) -> tuple[TrainablePaths, tuple[tuple[str, str], ...]]:
    """Returns the trainable paths, and rows with what each rule matched. Raises UserError for a rule that matches nothing."""
    total = count_params(cfg).total
    if lora:
        trainable = lora_only(cfg, lora)
        count = count_trainable(cfg, trainable)
        return trainable, (
            ("LoRA", f"{', '.join(lora.adapted_matrices)} of {cfg.layers} layers, rank {lora.rank}"),
            ("trainable", f"{count:,} parameters beside {total:,} frozen ones ({count / total:.1%})"),
        )
    trainable, matches = select_trainable(cfg, [] if train == ("all",) else train, freeze)
    size = lambda paths: count_trainable(cfg, TrainablePaths(frozenset(paths)))
    count = size(trainable.weights)
    return trainable, (
        *(
            (rule, f"{len(paths)} lea{'f' if len(paths) == 1 else 'ves'}, {size(paths):,} parameters")
            for rule, paths in matches.items()
        ),
        ("trainable", f"{count:,} of {total:,} parameters ({count / total:.1%})"),
    )

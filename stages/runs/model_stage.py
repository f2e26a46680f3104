"""ModelStage: loads a model, and saves its trained parameters, for fine-tuning and reinforcement learning."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from engine.counting.params import count_params
from engine.device import host_memory
from engine.errors import UserError
from engine.mesh import processes
from engine.mesh.layout import place
from engine.model.config import LoraConfig, ModelConfig
from engine.storage.adapter import save_adapter
from engine.storage.digest import digest
from engine.storage.model_loader import load_model
from engine.storage.run_folder import ADAPTER
from engine.text.chat_tokenizer import ChatTokenizer
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state
from stages.cli.console import Console
from stages.runs.mesh import choose_mesh, on_one_device
from stages.runs.run import Stage
from stages.runs.trainable import split_trainable


class ModelStage(Stage):
    """A Stage that trains a loaded model. The subclass sets `plan`, and `facts` to its own entries of run.json."""

    facts: dict[str, Any]

    def __init__(
        self, name: str, lora: LoraConfig | None, folder: Path, console: Console, template: str | None = None,
        on_config: Callable[[ModelConfig], None] = lambda cfg: None, mesh: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.lora, self.folder, self.console = name, lora, folder, console
        self.on_mesh = choose_mesh(mesh) is not None
        with console.task(f"loading {name}") as report, host_memory(self.on_mesh):
            self.model = load_model(name, dtype=None if lora else "float32", report=report, on_config=on_config)
        for run in (self.model.run, *self.model.base_runs):
            if run and run.resolve() == folder.resolve():
                owner = "the model itself" if run is self.model.run else f"the base that {self.model.run} adapts"
                raise UserError(f"{folder} is the run of {owner}, which would be overwritten. Give another --out-dir.")
        console.print_notes(self.model.notes)
        # Saved with the run: the chat's template, and all ids that end a completion.
        self.chat = ChatTokenizer(self.model.tokenizer, template)
        self.tokenizer = copy.copy(self.model.tokenizer)
        self.tokenizer.config = self.tokenizer.config | {"chat_template": self.chat.source}
        self.sampling = self.model.sampling
        self.stop_token_ids = tuple(dict.fromkeys((*self.model.eos_ids, *self.chat.eot_ids)))

    def load_weights(self) -> None:
        """Splits the parameters, and adds the digest of all, as loaded, to the facts, for `find_previous_run`."""
        params, plan = self.model.params, self.plan
        assert plan.trainable is not None
        with host_memory(self.on_mesh):
            self.split = split_trainable(plan.cfg, params, plan.trainable, self.lora, plan.base, plan.seed)
        path, source = Path(self.name).expanduser(), self.name
        if path.exists():  # absolute, to be found again
            source = str(path.absolute())
        elif "/" in source:  # on the hub, at the commit that was loaded
            source = f"{self.model.hub_id}@{self.model.checkpoint.name}"
        self.facts = {
            "kind": "adapter" if self.lora else "model",
            "base": {"model": source, "digest": digest(params), "name": self.model.name},
            "tokenizer": {"kind": "the model's", "digest": self.model.tokenizer.digest},
            **self.facts,
        }
        if plan.base == "int8":
            self.model = dataclasses.replace(self.model, params=None)  # frees the float weights

    def place(self) -> None:
        """Spreads the parameters over the mesh, from the host's memory, which keeps what was loaded."""
        cfg, split = self.plan.cfg, self.split
        if self.on_mesh:
            self.split = dataclasses.replace(
                split, trainable=place(cfg, split.trainable), frozen=place(cfg, split.frozen),
                frozen_as_loaded=jax.device_get(split.frozen_as_loaded),
            )  # fmt: skip
            self.model = dataclasses.replace(self.model, params=jax.device_get(self.model.params))

    def initial_state(self, trainable: Any) -> TrainState:
        """Returns the state before the first step. A copy: steps donate it, and the report compares with the start."""
        return init_state(make_optimizer(self.plan.recipe.optimizer), jax.tree.map(jnp.copy, trainable))

    def model_row(self) -> tuple[str, str]:
        plan, cfg = self.plan, self.plan.cfg
        numbers = f"{count_params(cfg).total:,} numbers, {'int8' if plan.base == 'int8' else cfg.dtype}"
        return "model", f"{plan.name}: {cfg.layers} layers, width {cfg.width}, {numbers}"

    def save_trained(self, step: int, trainable: Any) -> Path:
        """Saves an adapter, if one was trained, beside the checkpoints. Returns where the trained parameters are.

        Raises RuntimeError when the digest of the base has changed; one in int8 is gone by now and not checked.
        """
        self.chat.close()
        if not self.split.is_adapter:
            return self.folder / "checkpoints" / str(step)
        base, params = self.facts["base"], self.model.params
        if params is not None and digest(params) != base["digest"]:
            raise RuntimeError(f"Frozen weights changed: their SHA-256 was {base['digest']}.")
        with on_one_device(self.plan.cfg, trainable) as whole:
            if processes.is_first():
                name = base["model"] if Path(base["model"]).exists() else base["model"].partition("@")[0]
                save_adapter(self.folder / ADAPTER, self.plan.cfg, whole, base=base["digest"], base_name=name)
        return self.folder / ADAPTER

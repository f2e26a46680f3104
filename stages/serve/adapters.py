"""The adapters that requests name as their model: read when the server starts, or while it serves."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import InvalidField, UserError
from engine.inference.request import Adapter
from engine.model.config import ModelConfig
from engine.model.paths import leaf_paths
from engine.model.weights.lora import LoRA
from engine.storage.adapter import DoRA
from engine.storage.digest import digest
from engine.storage.model_loader import read_adapter
from stages.serve.engine_thread import EngineThread
from stages.serve.errors import ApiError


class AdapterTable:
    """The adapters by their names, in the stacks of an engine.

    `base`: the digest of the model that they are for. `folder`: from below which clients may add
    some; none if None. `trees`: those that are there from the start, as `read_shared_adapter` has them.
    """

    def __init__(
        self, engine: EngineThread, base: str, folder: Path | None, trees: Mapping[str, Any]
    ) -> None:
        self._engine = engine
        self._base = base
        self._folder = folder
        self._adding = asyncio.Lock()
        self.adapters: dict[str, Adapter] = {}
        for index, (name, tree) in enumerate(trees.items(), 1):
            self.adapters[name] = self._put(index, tree)

    def _put(self, index: int, adapter: Any) -> Adapter:
        """Puts the tree of an adapter into new stacks; returns the adapter as requests have it."""
        self._engine.engine.runner.put_adapter(index, adapter)
        return Adapter(digest(adapter), index)

    async def add(self, name: str, folder: str) -> None:
        """Reads an adapter from below the folder for them, off the event loop, one at a time.

        Raises ApiError, and InvalidField for a folder that cannot be served.
        """
        if self._folder is None:
            remedy = "--adapter-folder names the folder from below which they may come"
            message = f"No adapters are taken in here; {remedy}."
            raise ApiError(403, message, code="no_adapters")
        config = self._engine.engine.config
        async with self._adding:
            if name in self.adapters:
                raise ApiError(409, f"There is an adapter {name!r} already: remove it first.", param="name")
            indices = [adapter.index for adapter in self.adapters.values()]
            # In the engine's thread, behind every request that has looked its adapter up.
            index = await self._engine.call(partial(self._engine.engine.free_adapter_index, indices))
            if index is None:
                message = (
                    f"At most {config.adapters} adapters are held at once (--max-adapters), "
                    "those that were removed as long as requests with them are under way. "
                    "Remove one, or try again."
                )
                raise ApiError(409, message, code="too_many_adapters", headers={"Retry-After": "1"})
            root = self._folder
            try:
                tree = await asyncio.to_thread(self._read, root, folder)
            except UserError as error:
                message = str(error).replace(f"{root}/", "")
                raise InvalidField("folder", message) from None
            self.adapters[name] = await asyncio.to_thread(self._put, index, tree)

    def _read(self, root: Path, name: str) -> Any:
        """Returns the tree of the adapter in the folder of this name below root. Raises UserError."""
        folder = folder_below(root, name)
        rank = self._engine.engine.config.adapter_rank
        tree, _ = read_shared_adapter(self._engine.cfg, folder, self._base, rank)
        return tree

    def remove(self, name: str) -> None:
        """Lets no more requests name an adapter; those under way go on with it. Raises ApiError."""
        if self.adapters.pop(name, None) is None:
            raise ApiError(404, f"There is no adapter {name!r:.80} here.", code="model_not_found")


def read_shared_adapter(cfg: ModelConfig, folder: Path, base: str, rank: int) -> tuple[Any, Sequence[str]]:
    """Returns an adapter of at most `rank` as a tree of LoRA leaves, and notes to print.

    `base`: the digest of the model that it must be for. Raises UserError, also for an adapter that
    cannot share a batch with others.
    """
    adapter, _, notes = read_adapter(cfg, folder, lambda: base)
    for path, leaf in leaf_paths(adapter).items():
        if not isinstance(leaf, LoRA):
            kind = "a DoRA" if isinstance(leaf, DoRA) else "a weight that was trained whole"
            raise UserError(
                f"The adapter {folder} has {kind}, {path}, which can share no batch with other adapters. "
                f"Merge it by `python -m stages.export --model {folder} --out FOLDER`, and serve that."
            )
        if leaf.shape != cfg.matrices.get(path.rpartition("/")[2]):
            raise UserError(f"The adapter {folder} is damaged: {path} is of {leaf.shape}.")
        if leaf.rank > rank:
            raise UserError(
                f"The adapter {folder} has a rank of {leaf.rank}, above {rank}: --max-rank sets the largest."
            )
    return adapter, notes


def folder_below(root: Path, name: str) -> Path:
    """Returns the folder of this name below root.

    Raises UserError for one that lies elsewhere, is a link or holds one.
    """
    parts = name.split("/")
    folder = root.joinpath(*parts)
    leads_elsewhere = not set(parts).isdisjoint(("", ".", ".."))
    if leads_elsewhere or "\\" in name or not name.isprintable():
        remedy = "name it from there, such as voice or ours/voice"
        raise UserError(f"{name!r:.80} is no folder below the one for adapters: {remedy}.")
    if not folder.is_dir():
        raise UserError(f"There is no folder {name!r:.80} below the one for adapters.")
    is_link = folder.resolve() != root.resolve().joinpath(*parts)
    if is_link or any(path.is_symlink() for path in folder.rglob("*")):
        raise UserError(f"{name!r:.80} is a link or holds one; copy what it leads to.")
    return folder

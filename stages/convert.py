"""Convert a run that an earlier version saved, so that all commands load it: in place, whole or not at all.

uv run --extra older python -m stages.convert --model runs/demo-shakespeare

Earlier versions saved in Orbax's format, and held q, k and v in one array, and gate and up: each is one of its own now.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from engine.errors import UserError
from engine.files import atomic_folder
from stages.cli import signals
from stages.cli.command import leave, run_command
from stages.cli.flags import parser, path

MAX_METADATA_BYTES = 64 * 2**20


class EarlierArray(NamedTuple):
    path: str
    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class ConvertFlags:
    """The run."""

    model: Annotated[Path, parser(path, "RUN")]
    """A run folder. Its tokenizer, log and adapter stay as they are."""


def convert(flags: ConvertFlags) -> None:
    """Replaces all checkpoints of the run at once. Raises UserError when one is damaged, and changes nothing then."""
    signals.set_phase("while the run was converted: it is as it was, or converted whole.")
    from engine import manifest
    from stages.runs.folder import lock_run

    run = flags.model
    if not (run / "run.json").is_file():
        raise UserError(f"There is no run at {run}: --model takes a run folder.")
    with lock_run(run):
        old = [step for step in sorted(run.glob("checkpoints/[0-9]*"), key=lambda step: step.name) if _is_old(step)]
        if not old:
            print(f"Nothing to convert: no checkpoint of {run} is of an earlier version.")
            return
        if damaged := [line for step in old for line in manifest.verify(step)]:
            raise UserError(f"{run} is damaged: {'; '.join(damaged)}. Move that checkpoint elsewhere, and convert the others.")
        widths = _widths(run)
        with atomic_folder(run / "checkpoints") as building:
            for entry in (run / "checkpoints").glob("[!.]*"):
                if entry in old:
                    _convert_step(entry, building / entry.name, widths)
                else:
                    shutil.copytree(entry, building / entry.name)
    print(f"Converted {', '.join(str(step) for step in old)}.")


def _is_old(step: Path) -> bool:
    from engine.storage import checkpoint_reader

    if (step / "params").is_dir():
        return True
    try:
        return any(map(checkpoint_reader.JOINED_BEFORE.fullmatch, checkpoint_reader.stored_arrays(step, "params")))
    except UserError:
        return True  # damaged: its manifest is read next, and names the file


def _widths(run: Path) -> dict[str, int]:
    """Returns the columns of each matrix of a block that the run trains: a LoRA run those that it adapts."""
    from engine.storage.model_loader import locate, read_adapter_record
    from engine.storage.run_folder import read_config

    matrices = read_config(run).matrices
    names = read_adapter_record(run)[2].adapted_matrices if locate(str(run)).format == "adapter" else matrices
    return {name: matrices[name][1] for name in names}


def _convert_step(old: Path, new: Path, widths: dict[str, int]) -> None:
    import jax
    import numpy as np

    from engine import manifest
    from engine.storage import safetensors_writer

    new.mkdir()
    entries = {}
    for part in ("params", "optimizer"):
        arrays = [piece for array in _open_arrays(old, part) for piece in _apart(array, widths)]
        shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype, _ in arrays}
        reading = lambda arrays=arrays: (read() for *_, read in arrays)  # one at a time
        encode = lambda shapes=shapes, reading=reading: safetensors_writer.encode(shapes, reading())
        entries[f"{part}.safetensors"] = manifest.write_checked(new / f"{part}.safetensors", encode)
    entries["state.json"] = manifest.write_checked(new / "state.json", lambda: [np.fromfile(old / "state.json", np.uint8)])
    (new / manifest.NAME).write_bytes(manifest.render(entries))


def _apart(array: EarlierArray, widths: dict[str, int]) -> Iterator[EarlierArray]:
    """Yields an array, or those that lie side by side in it: of `widths` columns, or a LoRA pair's a of equal ones."""
    from engine.model.config import JOINED
    from engine.storage.checkpoint_reader import JOINED_BEFORE

    path, shape, dtype, read = array
    if not (match := JOINED_BEFORE.fullmatch(path)):
        yield array
        return
    start, joined, bias, half = match.groups()
    names, first = [name for name in JOINED[joined] if name in widths], 0
    for name in names:
        columns = shape[-1] // len(names) if half == "a" else widths[name]
        cut = lambda first=first, stop=first + columns: read()[..., first:stop]
        end = (bias or "") + (f"/{half}" if half else "")
        yield EarlierArray(f"{start}{name}{end}", (*shape[:-1], columns), dtype, cut)
        first += columns


def _open_arrays(step: Path, part: str) -> list[EarlierArray]:
    """Opens the arrays of one part of an old checkpoint: Orbax keeps them in one OCDBT database of TensorStore's."""
    from engine.untrusted import read_json_object

    folder = step / part
    if not folder.is_dir():
        return _open_safetensors(step, part)
    try:
        import tensorstore
    except ImportError:
        raise UserError(
            "To read Orbax's format takes TensorStore: install the extra `older` (uv sync --extra older)."
        ) from None
    metadata = read_json_object(folder / "_METADATA", MAX_METADATA_BYTES)
    try:
        entries = [entry for entry in metadata["tree_metadata"].values() if entry["value_metadata"]["value_type"] != "None"]
        paths = [[key["key"] for key in entry["key_metadata"]] for entry in entries]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / '_METADATA'} is damaged: it does not name the arrays of a checkpoint.") from None
    database = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/"}
    source = lambda path: {"driver": "auto", "kvstore": {**database, "path": ".".join(path) + "/"}}
    stores = {"/".join(path): tensorstore.open(source(path), read=True).result() for path in paths}
    whole = lambda store: lambda: store.read().result()
    return [EarlierArray(path, store.shape, store.dtype.numpy_dtype, whole(store)) for path, store in stores.items()]


def _open_safetensors(step: Path, part: str) -> list[EarlierArray]:
    import numpy as np

    from engine.storage import checkpoint_reader

    def whole(array: checkpoint_reader.StoredArray) -> Callable[[], Any]:
        def read() -> np.ndarray:
            array.read(tuple((0, size) for size in array.shape), out := np.empty(array.shape, array.dtype))
            return out

        return read

    stored = checkpoint_reader.stored_arrays(step, part)
    return [EarlierArray(path, array.shape, array.dtype, whole(array)) for path, array in stored.items()]


main = functools.partial(run_command, "convert", __doc__, ConvertFlags, convert)


if __name__ == "__main__":
    leave(main())

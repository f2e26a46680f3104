"""Convert a run that an earlier version saved in Orbax's format, so that all commands load it: in place, whole or not at all.

uv run --extra older python -m stages.convert --model runs/demo-shakespeare
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from engine.errors import UserError
from engine.files import atomic_folder
from stages.cli import signals
from stages.cli.command import run_command
from stages.cli.flags import parser, path
from stages.cli.process import leave

MAX_METADATA_BYTES = 64 * 2**20


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
        old = sorted((path.parent for path in run.glob("checkpoints/*/params") if path.is_dir()), key=lambda step: step.name)
        if not old:
            print(f"Nothing to convert: no checkpoint of {run} is in Orbax's format.")
            return
        if damaged := [line for step in old for line in manifest.verify(step)]:
            raise UserError(f"{run} is damaged: {'; '.join(damaged)}. Move that checkpoint elsewhere, and convert the others.")
        with atomic_folder(run / "checkpoints") as building:
            for entry in (run / "checkpoints").glob("[!.]*"):
                if entry in old:
                    _convert_step(entry, building / entry.name)
                else:
                    shutil.copytree(entry, building / entry.name)
    print(f"Converted {', '.join(str(step) for step in old)}.")


def _convert_step(old: Path, new: Path) -> None:
    import jax
    import numpy as np

    from engine import manifest
    from engine.storage.huggingface import safetensors

    new.mkdir()
    entries = {}
    for part in ("params", "optimizer"):
        stores = _open_arrays(old / part)
        shapes = {name: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype) for name, store in stores.items()}
        arrays = lambda stores=stores: (store.read().result() for store in stores.values())  # one at a time
        encode = lambda shapes=shapes, arrays=arrays: safetensors.encode(shapes, arrays())
        entries[f"{part}.safetensors"] = manifest.write_checked(new / f"{part}.safetensors", encode)
    entries["state.json"] = manifest.write_checked(new / "state.json", lambda: [np.fromfile(old / "state.json", np.uint8)])
    (new / manifest.NAME).write_bytes(manifest.render(entries))


def _open_arrays(folder: Path) -> dict[str, Any]:
    """Opens the arrays of one part of an old checkpoint, by path: Orbax keeps them in one OCDBT database of TensorStore's."""
    from engine.untrusted import read_json_object

    if not folder.is_dir():
        return {}  # a part without arrays
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
    return {"/".join(path): tensorstore.open(source(path), read=True).result() for path in paths}


def main(args: Sequence[str] | None = None) -> int:
    return run_command("convert", __doc__, ConvertFlags, convert, args)


if __name__ == "__main__":
    leave(main())

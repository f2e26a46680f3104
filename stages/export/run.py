"""Write a model for others: a Hugging Face folder, a GGUF file for llama.cpp, or a LoRA adapter in PEFT's layout.

    python -m stages.export --model runs/demo-shakespeare --out exported --check
    python -m stages.export --model smollm2-135m-instruct --out smollm2.gguf --dtype q8_0
    python -m stages.export --model runs/smollm2-135m-instruct-voice --out voice-adapter --adapter --check

A LoRA model is written with its adapters folded in, unless --adapter says otherwise.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stages.cli.command import command_line, run_command
from stages.cli.flags import DeviceFlag, ModelFlag, VerboseFlag, default, one_of, parser, path

if TYPE_CHECKING:
    from engine.storage.loaded_model import LoadedModel

DTYPES = ("float32", "bfloat16", "float16", "q8_0")
WRITTEN = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "adapter_config.json", "adapter_model.safetensors",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Export:
    """A model, where it goes, and how its weights are written."""

    out: Annotated[Path, parser(path, "PATH")]
    """A folder, or a file that ends in .gguf."""
    model: ModelFlag = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or a named model."""
    dtype: Annotated[str | None, parser(one_of(*DTYPES), "TYPE"), default("as loaded in a folder, float16 in a .gguf")] = None
    """float32, bfloat16, float16, or in a .gguf q8_0."""
    adapter: Annotated[bool, default("off")] = False
    """Write only the LoRA adapters, in PEFT's layout."""
    check: Annotated[bool, default("off")] = False
    """Read it again and compare logits, tokens and what ends a completion."""
    overwrite: Annotated[bool, default("off")] = False
    """Replace what an earlier export wrote there."""
    device: DeviceFlag = "auto"
    """auto, cpu, gpu or tpu."""
    verbose: VerboseFlag = False
    """Show the traceback of an error."""


def export(given: Export) -> int:
    """Loads, writes, and with --check reads again. 1 when what was read is not what was written."""
    from engine.device import start_jax
    from stages.cli import signals

    signals.set_phase("before the model was written.")
    started = start_jax(given.device)
    from engine import format as words
    from engine.errors import UserError
    from engine.model.weights.matmul import dense
    from engine.storage.find import load_model
    from stages.cli.console import Console

    to_gguf = given.out.suffix == ".gguf"
    if given.adapter and (to_gguf or given.dtype):
        raise UserError("--adapter writes a folder in PEFT's layout, in float32: it goes with neither a .gguf nor --dtype.")
    if given.dtype == "q8_0" and not to_gguf:
        raise UserError("--dtype q8_0 is of GGUF: give an --out that ends in .gguf, or another type.")
    _make_room(given.out, given.overwrite)
    with Console() as console:
        with console.task("loading") as report:
            model = load_model(given.model, report=report)
        console.warn_damaged(model.damaged, model.checkpoint)
        dtype = given.dtype or ("float16" if to_gguf else str(dense(model.params["embed"]).dtype))
        dtype = "float32" if given.adapter else dtype
        console.print_rows([("device", str(started)), ("model", str(model.checkpoint)), ("writes", f"{given.out}, {dtype}")])
        with console.task("writing", always=True) as report:
            notes = _write(given, model, dtype, to_gguf, report)
        for note in notes:
            console.print(note)
        console.print_rows([("written", f"{given.out}, {words.size(_size(given.out))}")])
        if not given.check:
            return 0
        from stages import export_check

        with console.task("checking", always=True):
            if given.adapter:
                rows, faults = export_check.compare_adapter(model, given.out)
            else:
                rows, faults = export_check.compare(model, given.out, dtype)
        console.print_rows(rows)
        for fault in faults:
            console.print(f"DIFFERS: {fault}", style="red")
        if not faults and not given.adapter:
            console.print(f"next: {command_line('generate', '--model', given.out)}")
    return 1 if faults else 0


def _make_room(out: Path, overwrite: bool) -> None:
    """Raises UserError when something lies where the export goes, unless it is an earlier one and may be replaced."""
    from engine.errors import UserError

    if not out.exists() or (out.is_dir() and not any(out.iterdir()) and out.suffix != ".gguf"):
        return
    strangers = sorted({entry.name for entry in out.iterdir()} - WRITTEN) if out.is_dir() else []
    if out.is_dir() == (out.suffix == ".gguf"):
        raise UserError(f"{out} is a {'folder' if out.is_dir() else 'file'}; give another --out.")
    if strangers:
        raise UserError(f"{out} holds {strangers[0]}, which no export wrote; give another --out.")
    if not overwrite:
        raise UserError(f"{out} is there already; give another --out, or --overwrite.")


def _write(given: Export, model: "LoadedModel", dtype: str, to_gguf: bool, report: Any) -> list[str]:
    """Writes the export, whole or not at all; returns what a person should know of it."""
    from engine.files import whole_folder
    from engine.storage.gguf import save as gguf_writer
    from engine.storage.gguf import tokenizer_metadata as gguf_words
    from engine.storage.huggingface import folder as huggingface
    from engine.storage.huggingface import peft

    tokenizer = model.tokenizer
    if to_gguf:
        said = gguf_words.words_to(tokenizer.to_json(), tokenizer.config, model.ends, model.tokenizer.start, model.cfg.vocab)
        gguf_writer.save_gguf(given.out, model.cfg, model.params, said, name=model.name, dtype=dtype, report=report)
        if "tokenizer.huggingface.json" not in said:
            return []
        return [
            f"llama.cpp has no name for how this tokenizer splits a text and is told {gguf_words.NEAREST}: numbers and "
            "long words may become other tokens there. Thrice reads the tokenizer.json that is in the file too."
        ]
    with whole_folder(given.out) as building:
        if given.adapter:
            peft.save_peft(building, model.cfg, model.params, _base(model))
        else:
            tokens = {"eos_token_id": list(model.ends) if len(model.ends) > 1 else model.ends[0]}
            for name in ("bos_token", "pad_token"):
                place = tokenizer.id_of(tokenizer.config.get(name))
                tokens |= {} if place is None else {f"{name}_id": place}
            huggingface.save_folder(building, model.cfg, model.params, tokens, dtype=dtype, report=report)
        tokenizer.save(building)
    return []


def _base(model: "LoadedModel") -> str:
    """What the model that an adapter was learnt about is called."""
    from engine.storage.run_folder import read_json

    about = read_json(model.run / "run.json") if model.run else {}
    return about.get("base", {}).get("model") or model.name


def _size(out: Path) -> int:
    return sum(file.stat().st_size for file in out.iterdir()) if out.is_dir() else out.stat().st_size


def main(args: Sequence[str] | None = None) -> int:
    return run_command("export", __doc__, Export, export, args)


if __name__ == "__main__":
    sys.exit(main())

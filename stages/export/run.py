"""One export: loads the model, writes it whole or not at all, and with --check reads it again."""

from pathlib import Path

from engine.device import Device
from engine.errors import UserError
from engine.files import whole_folder
from engine.format import size
from engine.model.weights.matmul import dense
from engine.storage import run_folder
from engine.storage.adapter import save_adapter, without_adapters
from engine.storage.digest import digest
from engine.storage.find import load_model
from engine.storage.gguf.file import save_gguf
from engine.storage.gguf.tokenizer import NEAREST_SPLIT, tokenizer_metadata
from engine.storage.huggingface.folder import save_folder
from engine.storage.loaded_model import LoadedModel
from stages.cli.command import command_line
from stages.cli.console import Console, ReportProgress
from stages.export import check
from stages.export.flags import Export

WRITTEN = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "adapter_config.json", "adapter_model.safetensors",
}  # fmt: skip
NOTE = (
    f"llama.cpp has no name for how this tokenizer splits a text and is told {NEAREST_SPLIT}: numbers and long words may "
    "become other tokens there. Thrice reads the tokenizer.json that is in the file too."
)


def run(flags: Export, device: Device) -> int:
    """Loads, writes, and with --check reads again. 1 when what was read is not what was written."""
    out, to_gguf = flags.out, flags.out.suffix == ".gguf"
    if flags.adapter and (to_gguf or flags.dtype):
        raise UserError("--adapter writes a folder in PEFT's layout, in float32: it goes with neither a .gguf nor --dtype.")
    if flags.dtype == "q8_0" and not to_gguf:
        raise UserError("--dtype q8_0 is of GGUF: give an --out that ends in .gguf, or another type.")
    _check_free(out, to_gguf, flags.overwrite)
    with Console() as console:
        with console.task("loading") as report:
            model = load_model(flags.model, report=report)
        console.warn_damaged(model.damaged, model.checkpoint)
        dtype = flags.dtype or ("float16" if to_gguf else str(dense(model.params["embed"]).dtype))
        dtype = "float32" if flags.adapter else dtype
        console.print_rows([("device", str(device)), ("model", str(model.checkpoint)), ("writes", f"{out}, {dtype}")])
        note = ""
        with console.task("writing", always=True) as report:
            if to_gguf:
                note = _write_gguf(out, model, dtype, report)
            else:
                _write_folder(out, model, dtype, flags.adapter, report)
        if note:
            console.print(note)
        files = [out] if to_gguf else out.iterdir()
        console.print_rows([("written", f"{out}, {size(sum(file.stat().st_size for file in files))}")])
        if not flags.check:
            return 0
        with console.task("checking", always=True):
            rows, faults = check.compare_adapter(model, out) if flags.adapter else check.compare(model, out, dtype)
        console.print_rows(rows)
        for fault in faults:
            console.print(f"DIFFERS: {fault}", style="red")
        if not faults and not flags.adapter:
            console.print(f"next: {command_line('generate', '--model', out)}")
    return 1 if faults else 0


def _check_free(out: Path, to_gguf: bool, overwrite: bool) -> None:
    """Raises UserError when something lies where the export goes, unless it is an earlier one and may be replaced."""
    if not out.exists():
        return
    if out.is_dir() == to_gguf:
        raise UserError(f"{out} is a {'folder' if to_gguf else 'file'}; give another --out.")
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name}
    strangers = [] if to_gguf else sorted(names - WRITTEN)
    if strangers:
        raise UserError(f"{out} holds {strangers[0]}, which no export wrote; give another --out.")
    if names and not overwrite:
        raise UserError(f"{out} is there already; give another --out, or --overwrite.")


def _write_gguf(out: Path, model: LoadedModel, dtype: str, report: ReportProgress) -> str:
    """Writes a .gguf file; returns what a person should know of it, if anything."""
    tokenizer = model.tokenizer
    metadata = tokenizer_metadata(tokenizer.to_json(), tokenizer.config, model.ends, tokenizer.start, model.cfg.vocab)
    save_gguf(out, model.cfg, model.params, metadata, name=model.name, dtype=dtype, report=report)
    return NOTE if "tokenizer.huggingface.json" in metadata else ""


def _write_folder(out: Path, model: LoadedModel, dtype: str, adapter: bool, report: ReportProgress) -> None:
    """Writes a Hugging Face folder, or one with the LoRA adapters alone."""
    with whole_folder(out) as building:
        if adapter:
            record = run_folder.read_json(model.run / "run.json") if model.run else {}
            base, name = digest(without_adapters(model.params)), record.get("base", {}).get("model") or model.name
            save_adapter(building, model.cfg, model.params, base=base, base_name=name)
        else:
            tokens = {"eos_token_id": list(model.ends) if len(model.ends) > 1 else model.ends[0]}
            for name in ("bos_token", "pad_token"):
                token = model.tokenizer.id_of(model.tokenizer.config.get(name))
                tokens |= {} if token is None else {f"{name}_id": token}
            save_folder(building, model.cfg, model.params, tokens, dtype=dtype, report=report)
        model.tokenizer.save(building)

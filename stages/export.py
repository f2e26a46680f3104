"""Export a model: a Hugging Face folder, a GGUF file for llama.cpp, or a LoRA adapter in PEFT's layout.

    python -m stages.export --model runs/demo-shakespeare --out exported --check
    python -m stages.export --model smollm2-135m-instruct --out smollm2.gguf --dtype q8_0
    python -m stages.export --model runs/demo-shakespeare --out demo.gguf --dtype q4_0    as `serve --weights q4`
    python -m stages.export --model runs/smollm2-135m-instruct-voice --out voice-adapter --adapter --check

A LoRA model is written with its adapters merged in, unless --adapter says otherwise. What could not
be loaded again is not written.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from engine.device import start_jax
from engine.errors import UserError
from engine.files import atomic_file, atomic_folder
from engine.format import format_bytes
from stages.cli import signals
from stages.cli.command import command_line, leave, run_command
from stages.cli.console import Console, ReportProgress
from stages.cli.flags import (
    DeviceFlag,
    ModelFlag,
    VerboseFlag,
    choose_sampling,
    default,
    one_of,
    parser,
    path,
)

if TYPE_CHECKING:
    from engine.storage.model_loader import LoadedModel
    from engine.text.corpus import Corpus, Document
    from engine.text.tokenizer import Tokenizer
    from stages.runs.text_data import Source

BLOCKS = ("q8_0", "q4_0", "q4_1")
DTYPES = ("float32", "bfloat16", "float16", *BLOCKS)
EXPORT_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
}
CHECK_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces\tand a tab\n\n\nand lines",
    "In 1969, 12345 people; 3.14159!",
    "naïve café, 日本語, Ελληνικά, 🙂",
    "def f(x):\n    return x ** 2  # <|endoftext|> <|im_end|> is text",
    "don't I'LL we've",
)
TOLERANCE = 1e-3  # of the largest logit: the order of float32 sums
SAMPLE = 1024
WINDOW = 256  # tokens of a held-out text that rounding is measured on: in all, and read at once
EVALUATIONS = 5  # of --check: three of logits, two of bits per byte
MAX_LOSS = 0.01
MAX_LOSS_OF_4_BITS = 0.15  # bits per byte
Comparison = tuple[list[tuple[str, str]], list[str]]  # rows to print, and faults: what differs


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    out: Annotated[Path, parser(path, "PATH")]
    """A folder, or a file that ends in .gguf."""
    model: ModelFlag = None
    dtype: Annotated[str | None, one_of(*DTYPES), default("as loaded in a folder, float16 in a .gguf")] = None
    """float32, bfloat16, float16, or in a .gguf q8_0, q4_0 or q4_1."""
    adapter: Annotated[bool, default("off")] = False
    """Write only the LoRA adapters, in PEFT's layout."""
    base_name: Annotated[str | None, parser(str, "ORG/NAME"), default("as the base was loaded")] = None
    """The adapter's base: its id on the Hugging Face hub, or a folder that transformers reads."""
    check: Annotated[bool, default("off")] = False
    """Read it again: compare logits, tokens and EOS ids, and measure what rounding costs in bits per byte."""
    overwrite: Annotated[bool, default("off")] = False
    """Replace what an earlier export wrote there."""
    device: DeviceFlag = "auto"
    verbose: VerboseFlag = False


def export(flags: ExportFlags) -> int:
    """Returns 1 when the export, read again with --check, differs from the model, else 0."""
    signals.set_phase("before the model was written.")
    device = start_jax(flags.device)
    # These import JAX, here and below, which must be started first.
    import jax.numpy as jnp

    from engine.model.paths import map_paths
    from engine.model.weights.block_layout import KINDS
    from engine.model.weights.blocks import Blocks
    from engine.model.weights.lora import to_dense
    from engine.storage import run_folder
    from engine.storage.model_loader import load_model
    from engine.storage.tensor_layout import describe_kinds
    from engine.text.corpus import Corpus
    from stages.runs.text_data import TEXTS, evaluation_source

    out = flags.out
    to_gguf = flags.out.suffix == ".gguf"
    if flags.adapter and (to_gguf or flags.dtype):
        raise UserError(
            "--adapter writes a folder in PEFT's layout, in float32: "
            "it goes with neither a .gguf nor --dtype."
        )
    if flags.dtype in BLOCKS and not to_gguf:
        raise UserError(
            f"--dtype {flags.dtype} is of GGUF: give an --out that ends in .gguf, or another type."
        )
    if flags.base_name and not flags.adapter:
        raise UserError("--base-name names the base of an adapter: it goes with --adapter.")
    _check_free(out, to_gguf, flags.overwrite)
    with Console() as console:
        with console.task("loading") as report:
            model = load_model(flags.model, dtype="float32", report=report, keep_kinds=KINDS)
        if out.resolve() in (path.resolve() for path in model.bases):
            adapted = model.run or model.checkpoint
            raise UserError(
                f"{out} is the base that {adapted} adapts, which would be replaced. Give another --out."
            )
        console.print_notes(*model.notes)
        sampling, _ = choose_sampling(model.sampling, {}, {}, console, penalties=True)
        model = dataclasses.replace(model, sampling=sampling)
        stored: str = model.cfg.dtype
        record: dict[str, Any] = {}
        if model.run:
            stored = str(to_dense(model.params["embed"]).dtype)
            record = run_folder.read_json(model.run / "run.json")
        if flags.adapter:
            dtype = "float32"
        elif flags.dtype:
            dtype = flags.dtype
        elif to_gguf:
            dtype = "float16"
        else:
            dtype = stored
        rows = [("device", str(device)), ("model", str(model))]
        base_name = ""
        source: Source | None = None
        if flags.adapter:
            base = record.get("base", {}).get("model") or str([model.name, *model.bases][-1])
            base_name = _base_name(model, base, flags.base_name)
            rows.append(("base", base_name))
        else:
            keeps_blocks = model.run and flags.dtype in BLOCKS[1:]  # which trained so

            def to_written(_: str, leaf: Any) -> Any:
                if keeps_blocks and isinstance(leaf, Blocks):
                    return leaf
                # Adapters are merged in float32: their small numbers are rounded once, as they are
                # written.
                return to_dense(leaf, jnp.float32)

            params = map_paths(to_written, model.params)
            model = dataclasses.replace(model, params=params)
            if flags.check:
                text = record.get("text", {}).get("data")
                if text not in TEXTS:
                    text = "python"
                source = evaluation_source(text, console)
        console.print_rows(
            [*rows, ("file", describe_kinds(model.kinds, model.params)), ("writes", f"{out}, {dtype}")]
        )
        note = _write(out, model, dtype, base_name, console)
        console.print_notes(note)
        files = [out]
        if out.is_dir():
            files = [*out.iterdir()]
        size = sum(file.stat().st_size for file in files)
        console.print_rows([("written", f"{out}, {format_bytes(size)}")])
        if not flags.check:
            return 0
        with console.task("checking", always=True) as report:
            if isinstance(source, Corpus):
                rows, faults = compare(model, out, dtype, source, report)
            else:
                rows, faults = compare_adapter(model, out)
        console.print_rows(rows)
        for fault in faults:
            console.print(f"DIFFERS: {fault}", style="red")
        if not faults and not flags.adapter:
            console.print(f"next: {command_line('generate', '--model', out)}")
    return int(bool(faults))


def _base_name(model: "LoadedModel", base: str, base_name: str | None) -> str:
    """Returns the name by which PEFT finds `base`. Raises UserError when it is not known, or
    `base_name` cannot be one.
    """
    from engine.storage.adapter import adapter_leaves
    from engine.storage.hub import is_hub_id

    if model.merged:
        raise UserError(
            f"{model.merged[0]} is trained whole or a DoRA, and only LoRA is written here: "
            "export the model merged."
        )
    adapter_leaves(model.params)  # says so if there are none
    if base_name is None and model.hub_id:
        return model.hub_id
    folder = Path(base_name or base).expanduser()
    if (folder / "config.json").is_file() and not (folder / "run.json").exists():
        return str(folder.resolve())
    if base_name is None:
        raise UserError(
            f"PEFT looks for an adapter's base on the Hugging Face hub, and no id there is known for {base}: "
            "give --base-name ORG/NAME, or the folder that stages.export wrote of it."
        )
    if not is_hub_id(base_name):
        wanted = "an id on the Hugging Face hub, ORG/NAME, or a folder for transformers"
        raise UserError(f"--base-name is {wanted}, not {base_name!r}.")
    return base_name


def _check_free(out: Path, to_gguf: bool, overwrite: bool) -> None:
    """Raises UserError when something lies at `out` that is no earlier export, or one that may not
    be replaced.
    """
    if not out.exists():
        return
    if to_gguf and out.is_dir():
        raise UserError(f"{out} is a folder; give another --out.")
    if not to_gguf and not out.is_dir():
        raise UserError(f"{out} is a file; give another --out.")
    names = {out.name}
    if not to_gguf:
        names = {entry.name for entry in out.iterdir()}
    strangers = sorted(names - EXPORT_FILES)
    if not to_gguf and strangers:
        raise UserError(f"{out} holds {strangers[0]}, which no export wrote; give another --out.")
    if names and not overwrite:
        raise UserError(f"{out} is there already; give another --out, or --overwrite.")


def _write(out: Path, model: "LoadedModel", dtype: str, base_name: str, console: Console) -> str:
    """Writes the model, or with a `base_name` its adapter; returns a note to print, if any.

    Raises UserError, and leaves nothing, when it could not be loaded again.
    """
    from engine.storage.adapter import save_adapter, without_adapters
    from engine.storage.digest import digest
    from engine.storage.gguf import FALLBACK_PRE_TOKENIZER, sampling_metadata, save_gguf, tokenizer_metadata
    from engine.storage.huggingface import save_folder
    from engine.storage.model_loader import check_loads
    from engine.text.tokenizer import ModelTokenizer

    cfg = model.cfg
    params = model.params
    tokenizer = model.tokenizer
    if out.suffix == ".gguf":
        metadata = tokenizer_metadata(tokenizer, model.eos_ids, cfg.vocab) | sampling_metadata(model.sampling)
        with atomic_file(out) as file:
            with console.task("writing", always=True) as report:
                save_gguf(Path(file.name), cfg, params, metadata, name=model.name, dtype=dtype, report=report)
            with console.task("reading it again", always=True) as report:
                check_loads(Path(file.name), out, report)
        if "tokenizer.huggingface.json" not in metadata:
            return ""
        return (
            "llama.cpp has no name for how this tokenizer splits a text "
            f"and is told {FALLBACK_PRE_TOKENIZER}: numbers and long words may become other tokens there. "
            "Thrice reads the tokenizer.json that is in the file too."
        )
    with atomic_folder(out) as building:
        if base_name:
            with console.task("writing", always=True):
                save_adapter(
                    building, cfg, params, base=digest(without_adapters(params)), base_name=base_name
                )
                tokenizer.save(building)
            return ""
        written = ModelTokenizer(tokenizer, model.eos_ids, dict(model.sampling))
        with console.task("writing", always=True) as report:
            save_folder(building, cfg, params, written, dtype=dtype, report=report)
        with console.task("reading it again", always=True) as report:
            check_loads(building, out, report)
    return ""


def compare(
    model: "LoadedModel", out: Path, dtype: str, source: "Corpus[Document]", report: ReportProgress
) -> Comparison:
    """Compares the export with `model`, rounded alike, and measures on the beginning of a text what
    rounding costs.

    `report`: evaluations done and in all.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from engine.model.paths import map_paths
    from engine.model.transformer import forward
    from engine.model.weights.block_layout import GROUP
    from engine.model.weights.blocks import dense_blocks, round_to_blocks, served_kind
    from engine.model.weights.lora import to_dense
    from engine.storage.model_loader import load_model
    from engine.text.corpus import characters
    from stages.runs import text_data

    def rounded(path: str, leaf: Any) -> Any:
        plain = to_dense(leaf)
        # Blocks are written as they are
        if plain is not leaf or (plain.ndim < 2 and out.suffix == ".gguf"):
            return plain
        axis = int(path != "embed")
        if dtype in BLOCKS and plain.shape[1 - axis] % GROUP == 0:
            return dense_blocks(round_to_blocks(plain, served_kind(path, dtype.upper()), axis))
        return plain.astype("float16" if dtype in BLOCKS else dtype).astype(jnp.float32)

    def logits(params: Any) -> np.ndarray:
        """Returns logits (2, T, V) in float32."""
        sequences = np.resize(tokens, (2, min(64, cfg.context))).astype(np.int32)
        positions = np.broadcast_to(np.arange(sequences.shape[1], dtype=np.int32), sequences.shape)
        return np.asarray(jax.jit(forward, static_argnums=0)(cfg, params, sequences, positions)[0])

    def bits_per_byte(params: Any) -> float:
        seq = min(WINDOW, cfg.context, len(tokens) - 1)
        nats = text_data.score_text(cfg, params, tokens, seq, seq, 2)
        return text_data.bits_per_byte(nats, model.tokenizer.count_bytes(tokens[1:]))

    export = load_model(str(out), dtype="float32")
    faults = [f"{name} of the architecture" for name in model.cfg.architecture_differences(export.cfg)]
    faults += _tokenizer_faults(model.tokenizer, export.tokenizer)
    faults += ["the EOS ids"] * (model.eos_ids != export.eos_ids)
    faults += ["the BOS ids"] * (model.tokenizer.bos_ids != export.tokenizer.bos_ids)
    template = "absent"
    if export.tokenizer.config.get("chat_template"):
        template = "kept"
    rows = [
        ("tokens", f"{len(CHECK_TEXTS)} texts, of every script and with control tokens in them"),
        ("EOS ids", f"{', '.join(map(str, export.eos_ids))} and template {template}"),
    ]
    if faults:
        return rows, faults
    cfg = dataclasses.replace(model.cfg, dtype="float32")
    texts = itertools.islice(source, 8)
    sample = "\n".join("".join(characters(text, 0, 8 * SAMPLE)) for text in texts)[: 8 * SAMPLE]
    tokens = model.tokenizer.encode(sample)[: SAMPLE + 1]
    expected = logits(map_paths(rounded, model.params))
    report(1, EVALUATIONS)
    written = logits(export.params)
    report(2, EVALUATIONS)
    difference = float(np.abs(expected - written).max() / max(1e-30, np.abs(expected).max()))
    unrounded = map_paths(lambda _, leaf: to_dense(leaf), model.params)
    agreement = float((logits(unrounded).argmax(-1) == written.argmax(-1)).mean())
    report(3, EVALUATIONS)
    before = bits_per_byte(unrounded)
    report(4, EVALUATIONS)
    after = bits_per_byte(export.params)
    report(5, EVALUATIONS)
    rows += [
        (
            "logits",
            f"differ by at most {difference:.1e} of the largest from the model's, "
            "with its weights rounded as here",
        ),
        (
            "loss",
            f"{after - before:.5f} bits per byte by rounding "
            f"({before:.4f} -> {after:.4f} on {len(tokens):,} tokens of {source.name}); "
            f"the most probable token stays in {agreement:.1%} of places",
        ),
    ]
    if difference > TOLERANCE:
        faults.append("the logits")
    most = MAX_LOSS
    if dtype in BLOCKS[1:]:
        most = MAX_LOSS_OF_4_BITS
    if not after - before <= most:
        faults.append(
            f"the loss in bits per byte: {after - before:.4f}, and {most} is the most that rounding may cost"
        )
    return rows, faults


def compare_adapter(model: "LoadedModel", out: Path) -> Comparison:
    """Compares an exported adapter with the model's, to the bit."""
    from engine.model.paths import leaf_paths
    from engine.storage.adapter import adapter_leaves, load_adapter
    from engine.storage.digest import digest
    from engine.storage.huggingface import load_tokenizer

    ours = adapter_leaves(model.params)
    theirs = leaf_paths(load_adapter(out, model.cfg))
    faults = _tokenizer_faults(model.tokenizer, load_tokenizer(out).tokenizer)
    faults += [f"whether {name} is adapted" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if digest(dataclasses.replace(ours[name], base=None)) != digest(theirs[name]):
            faults.append(f"the adapter of {name}")
    rows = [
        ("adapters", f"of {len(theirs)} matrices, to the bit"),
        ("tokens", f"{len(CHECK_TEXTS)} texts, and the chat template"),
    ]
    return rows, faults


def _tokenizer_faults(ours: "Tokenizer", theirs: "Tokenizer") -> list[str]:
    faults = [
        f"the tokens of {text!r}" for text in CHECK_TEXTS if [*ours.encode(text)] != [*theirs.encode(text)]
    ]
    return faults + ["the chat template"] * (
        ours.config.get("chat_template") != theirs.config.get("chat_template")
    )


main = functools.partial(run_command, "export", __doc__, ExportFlags, export)


if __name__ == "__main__":
    leave(main())

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
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from engine.device import Device, start_jax
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
    default,
    one_of,
    parser,
    path,
)
from stages.cli.sampling import usable_recommendations

if TYPE_CHECKING:
    import numpy as np

    from engine.model.config import ModelConfig
    from engine.storage.model_loader import LoadedModel
    from engine.text.corpus import Corpus, Document
    from engine.text.tokenizer import Tokenizer

BLOCKS_OF_4_BITS = ("q4_0", "q4_1")
BLOCKS = ("q8_0", *BLOCKS_OF_4_BITS)
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
SAMPLE = 1024  # tokens of a held-out text that rounding is measured on
SAMPLE_CHARACTERS = 8 * SAMPLE  # of that text, which are encoded as those tokens
SAMPLE_DOCUMENTS = 8  # of that text, at most
WINDOW = 256  # tokens that are read at once for bits per byte
ROWS = 2  # sequences that are read together
LOGITS_WINDOW = 64  # tokens of a sequence whose logits are compared
EVALUATIONS = 5  # of --check: three of logits, two of bits per byte
MAX_LOSS = 0.01  # bits per byte that rounding may cost
MAX_LOSS_OF_4_BITS = 0.15


class Comparison(NamedTuple):
    """An export, read again, beside its model."""

    rows: list[tuple[str, str]]  # to print
    faults: list[str]  # what differs


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
    device = start_jax(flags.device)  # before JAX is imported, as the functions below do
    check_flags(flags)
    with Console() as console:
        if flags.adapter:
            faults = export_adapter(flags, device, console)
        else:
            faults = export_model(flags, device, console)
    return int(bool(faults))


def check_flags(flags: ExportFlags) -> None:
    """Raises UserError for flags that do not go together, and for an --out that is not free."""
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
    _check_free(flags.out, to_gguf, flags.overwrite)


def export_adapter(flags: ExportFlags, device: Device, console: Console) -> list[str]:
    """Writes the adapters of a model alone, and with --check compares them. Returns what differs."""
    model = _load(flags, console)
    base_name = _base_name(model, flags.base_name)
    console.print_rows(
        [
            ("device", str(device)),
            ("model", str(model)),
            ("base", base_name),
            *_rows_of_files(flags.out, model, "float32"),
        ]
    )
    _write_adapter(flags.out, model, base_name, console)
    _print_size(flags.out, console)
    if not flags.check:
        return []
    with console.task("checking", always=True):
        comparison = compare_adapter(model, flags.out)
    _print_comparison(comparison, console)
    return comparison.faults


def export_model(flags: ExportFlags, device: Device, console: Console) -> list[str]:
    """Writes a model with its adapters merged in, and with --check compares it. Returns what differs."""
    model = _load(flags, console)
    dtype = _dtype_to_write(flags, model)
    trained_in_blocks = model.run is not None and flags.dtype in BLOCKS_OF_4_BITS
    # The model as it was loaded is let go, so that its weights are in memory once.
    model = dataclasses.replace(model, params=_params_to_write(model.params, keep_blocks=trained_in_blocks))
    source = None
    if flags.check:
        source = _check_source(model, console)
    console.print_rows(
        [("device", str(device)), ("model", str(model)), *_rows_of_files(flags.out, model, dtype)]
    )
    if flags.out.suffix == ".gguf":
        console.print_notes(_write_gguf(flags.out, model, dtype, console))
    else:
        _write_folder(flags.out, model, dtype, console)
    _print_size(flags.out, console)
    if source is None:  # without --check
        return []
    with console.task("checking", always=True) as report:
        comparison = compare(model, flags.out, dtype, source, report)
    _print_comparison(comparison, console)
    if not comparison.faults:
        console.print(f"next: {command_line('generate', '--model', flags.out)}")
    return comparison.faults


def _load(flags: ExportFlags, console: Console) -> "LoadedModel":
    """Loads the model in float32, with those of its recommended sampling fields that can be used.

    Raises UserError when --out is a model below its adapters.
    """
    from engine.model.weights.block_layout import KINDS
    from engine.storage.model_loader import load_model

    out = flags.out
    with console.task("loading") as report:
        model = load_model(flags.model, dtype="float32", report=report, keep_kinds=KINDS)
    if out.resolve() in (base.resolve() for base in model.bases):
        adapted = model.run or model.checkpoint
        raise UserError(
            f"{out} is the base that {adapted} adapts, which would be replaced. Give another --out."
        )
    console.print_notes(*model.notes)
    sampling = usable_recommendations(model.sampling, console, penalties=True)
    return dataclasses.replace(model, sampling=sampling)


def _run_record(model: "LoadedModel") -> dict[str, Any]:
    """Returns the run.json of a model that was trained here, else nothing."""
    from engine.storage import run_folder

    if not model.run:
        return {}
    return run_folder.read_json(model.run / "run.json")


def _dtype_to_write(flags: ExportFlags, model: "LoadedModel") -> str:
    """Returns --dtype, else float16 for a .gguf, else the type the weights are stored in."""
    from engine.model.weights.lora import to_dense

    if flags.dtype:
        return flags.dtype
    if flags.out.suffix == ".gguf":
        return "float16"
    if model.run:
        return str(to_dense(model.params["embed"]).dtype)
    return model.cfg.dtype


def _params_to_write(params: Any, keep_blocks: bool) -> Any:
    """Returns params with the adapters merged in and every leaf dense in float32, but for Blocks
    with `keep_blocks`.
    """
    import jax.numpy as jnp

    from engine.model.paths import map_paths
    from engine.model.weights.blocks import Blocks
    from engine.model.weights.lora import to_dense

    def to_written(_: str, leaf: Any) -> Any:
        if keep_blocks and isinstance(leaf, Blocks):
            return leaf
        # Adapters are merged in float32: their small numbers are rounded once, as they are written.
        return to_dense(leaf, jnp.float32)

    return map_paths(to_written, params)


def _check_source(model: "LoadedModel", console: Console) -> "Corpus[Document]":
    """Returns the held-out part of the named text that the model was trained on, else of python."""
    from engine.text.corpus import Corpus
    from stages.runs.text_data import TEXTS, evaluation_source

    text = _run_record(model).get("text", {}).get("data")
    if text not in TEXTS:
        text = "python"
    source = evaluation_source(text, console)
    assert isinstance(source, Corpus)  # as every named text is
    return source


def _rows_of_files(out: Path, model: "LoadedModel", dtype: str) -> list[tuple[str, str]]:
    """Returns the banner's rows of the file that was read and the one that is written."""
    from engine.storage.kinds_in_words import describe_kinds

    return [("file", describe_kinds(model.kinds, model.params)), ("writes", f"{out}, {dtype}")]


def _print_size(out: Path, console: Console) -> None:
    files = [out]
    if out.is_dir():
        files = [*out.iterdir()]
    size = sum(file.stat().st_size for file in files)
    console.print_rows([("written", f"{out}, {format_bytes(size)}")])


def _print_comparison(comparison: Comparison, console: Console) -> None:
    console.print_rows(comparison.rows)
    for fault in comparison.faults:
        console.print(f"DIFFERS: {fault}", style="red")


def _base_of(model: "LoadedModel") -> str:
    """Returns the name or the folder of the model below the adapters."""
    trained_on = _run_record(model).get("base", {}).get("model")
    if trained_on:
        return str(trained_on)
    if model.bases:
        return str(model.bases[-1])
    return model.name


def _base_name(model: "LoadedModel", base_name: str | None) -> str:
    """Returns the name by which PEFT finds the base of a model's adapters: --base-name, or what is
    known of it. Raises UserError when nothing is, or `base_name` cannot be one.
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
    base = _base_of(model)
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


def _write_gguf(out: Path, model: "LoadedModel", dtype: str, console: Console) -> str:
    """Writes a model as a .gguf file; returns a note to print, if any.

    Raises UserError, and leaves nothing, when it could not be loaded again.
    """
    from engine.storage.gguf_writer import (
        FALLBACK_PRE_TOKENIZER,
        sampling_metadata,
        save_gguf,
        tokenizer_metadata,
    )
    from engine.storage.model_loader import check_loads

    cfg = model.cfg
    metadata = tokenizer_metadata(model.tokenizer, model.eos_ids, cfg.vocab)
    metadata |= sampling_metadata(model.sampling)
    with atomic_file(out) as file:
        building = Path(file.name)
        with console.task("writing", always=True) as report:
            save_gguf(building, cfg, model.params, metadata, name=model.name, dtype=dtype, report=report)
        with console.task("reading it again", always=True) as report:
            check_loads(building, out, report)
    if "tokenizer.huggingface.json" not in metadata:
        return ""
    return (
        "llama.cpp has no name for how this tokenizer splits a text "
        f"and is told {FALLBACK_PRE_TOKENIZER}: numbers and long words may become other tokens there. "
        "Thrice reads the tokenizer.json that is in the file too."
    )


def _write_folder(out: Path, model: "LoadedModel", dtype: str, console: Console) -> None:
    """Writes a model as a Hugging Face folder.

    Raises UserError, and leaves nothing, when it could not be loaded again.
    """
    from engine.storage.huggingface import save_folder
    from engine.storage.model_loader import check_loads
    from engine.text.tokenizer import ModelTokenizer

    tokenizer = ModelTokenizer(model.tokenizer, model.eos_ids, dict(model.sampling))
    with atomic_folder(out) as building:
        with console.task("writing", always=True) as report:
            save_folder(building, model.cfg, model.params, tokenizer, dtype=dtype, report=report)
        with console.task("reading it again", always=True) as report:
            check_loads(building, out, report)


def _write_adapter(out: Path, model: "LoadedModel", base_name: str, console: Console) -> None:
    """Writes a model's adapters and its tokenizer as a PEFT folder."""
    from engine.storage.adapter import without_adapters
    from engine.storage.adapter_writer import save_adapter
    from engine.storage.digest import digest

    with atomic_folder(out) as building, console.task("writing", always=True):
        base_digest = digest(without_adapters(model.params))
        save_adapter(building, model.cfg, model.params, base=base_digest, base_name=base_name)
        model.tokenizer.save(building)


def compare(
    model: "LoadedModel", out: Path, dtype: str, source: "Corpus[Document]", report: ReportProgress
) -> Comparison:
    """Compares the export with `model`, rounded alike, and measures on the beginning of a text what
    rounding costs.

    `report`: evaluations done and in all.
    """
    import numpy as np

    from engine.model.paths import map_paths
    from engine.model.weights.lora import to_dense
    from engine.storage.model_loader import load_model

    copy = load_model(str(out), dtype="float32")
    comparison = _compare_settings(model, copy)
    if comparison.faults:
        return comparison
    cfg = dataclasses.replace(model.cfg, dtype="float32")
    tokens = _sample(source, model.tokenizer)
    rounded = round_as_written(model.params, dtype, in_gguf=out.suffix == ".gguf")
    expected = logits_of_text(cfg, rounded, tokens)
    del rounded  # before the next evaluation takes memory
    report(1, EVALUATIONS)
    actual = logits_of_text(cfg, copy.params, tokens)
    report(2, EVALUATIONS)
    difference = float(np.abs(expected - actual).max() / max(1e-30, np.abs(expected).max()))
    unrounded = map_paths(lambda _, leaf: to_dense(leaf), model.params)
    agreement = float((logits_of_text(cfg, unrounded, tokens).argmax(-1) == actual.argmax(-1)).mean())
    report(3, EVALUATIONS)
    before = bits_per_byte_of(cfg, unrounded, tokens, model.tokenizer)
    report(4, EVALUATIONS)
    after = bits_per_byte_of(cfg, copy.params, tokens, model.tokenizer)
    report(5, EVALUATIONS)
    rows = [
        *comparison.rows,
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
    faults = []
    if difference > TOLERANCE:
        faults.append("the logits")
    most = MAX_LOSS
    if dtype in BLOCKS_OF_4_BITS:
        most = MAX_LOSS_OF_4_BITS
    if not after - before <= most:  # also when it is not a number
        faults.append(
            f"the loss in bits per byte: {after - before:.4f}, and {most} is the most that rounding may cost"
        )
    return Comparison(rows, faults)


def _compare_settings(model: "LoadedModel", copy: "LoadedModel") -> Comparison:
    """Compares architecture, tokenizer and the ids that begin and end a text."""
    faults = [f"{name} of the architecture" for name in model.cfg.architecture_differences(copy.cfg)]
    faults += _tokenizer_faults(model.tokenizer, copy.tokenizer)
    if model.eos_ids != copy.eos_ids:
        faults.append("the EOS ids")
    if model.tokenizer.bos_ids != copy.tokenizer.bos_ids:
        faults.append("the BOS ids")
    template = "absent"
    if copy.tokenizer.config.get("chat_template"):
        template = "kept"
    rows = [
        ("tokens", f"{len(CHECK_TEXTS)} texts, of every script and with control tokens in them"),
        ("EOS ids", f"{', '.join(map(str, copy.eos_ids))} and template {template}"),
    ]
    return Comparison(rows, faults)


def _sample(source: "Corpus[Document]", tokenizer: "Tokenizer") -> "np.ndarray":
    """Returns the first tokens (N,) int32 of a text, at most SAMPLE + 1."""
    from engine.text.corpus import characters

    documents = itertools.islice(source, SAMPLE_DOCUMENTS)
    beginnings = ["".join(characters(document, 0, SAMPLE_CHARACTERS)) for document in documents]
    text = "\n".join(beginnings)[:SAMPLE_CHARACTERS]
    return tokenizer.encode(text)[: SAMPLE + 1]


def round_as_written(params: Any, dtype: str, in_gguf: bool) -> Any:
    """Returns params as an export in `dtype` holds them, dense in float32."""
    import jax.numpy as jnp

    from engine.model.paths import map_paths
    from engine.model.weights.block_layout import GROUP
    from engine.model.weights.blocks import dense_blocks, round_to_blocks, served_kind
    from engine.model.weights.lora import to_dense

    plain_dtype = dtype
    if dtype in BLOCKS:
        plain_dtype = "float16"

    def rounded(path: str, leaf: Any) -> Any:
        plain = to_dense(leaf)
        if plain is not leaf:  # blocks, which are written as they are
            return plain
        if plain.ndim < 2 and in_gguf:
            return plain
        axis = int(path != "embed")
        if dtype in BLOCKS and plain.shape[1 - axis] % GROUP == 0:
            return dense_blocks(round_to_blocks(plain, served_kind(path, dtype.upper()), axis))
        return plain.astype(plain_dtype).astype(jnp.float32)

    return map_paths(rounded, params)


def logits_of_text(cfg: "ModelConfig", params: Any, tokens: "np.ndarray") -> "np.ndarray":
    """Returns the logits (ROWS, T, V) in float32 of the beginning of `tokens` (N,)."""
    import jax
    import numpy as np

    from engine.model.transformer import forward

    sequences = np.resize(tokens, (ROWS, min(LOGITS_WINDOW, cfg.context))).astype(np.int32)
    positions = np.broadcast_to(np.arange(sequences.shape[1], dtype=np.int32), sequences.shape)
    logits, _ = jax.jit(forward, static_argnums=0)(cfg, params, sequences, positions)
    return np.asarray(logits)


def bits_per_byte_of(cfg: "ModelConfig", params: Any, tokens: "np.ndarray", tokenizer: "Tokenizer") -> float:
    """Returns the loss on tokens (N,), in bits per byte of their text; the first is not predicted."""
    from stages.runs.text_evaluators import bits_per_byte, score_text

    seq = min(WINDOW, cfg.context, len(tokens) - 1)
    nats = score_text(cfg, params, tokens, seq, seq, ROWS)
    return bits_per_byte(nats, tokenizer.count_bytes(tokens[1:]))


def compare_adapter(model: "LoadedModel", out: Path) -> Comparison:
    """Compares an exported adapter with the model's, to the bit."""
    from engine.model.paths import leaf_paths
    from engine.storage.adapter import adapter_leaves
    from engine.storage.adapter_reader import load_adapter
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
    return Comparison(rows, faults)


def _tokenizer_faults(ours: "Tokenizer", theirs: "Tokenizer") -> list[str]:
    """Returns what two tokenizers make differently."""
    faults = [
        f"the tokens of {text!r}" for text in CHECK_TEXTS if [*ours.encode(text)] != [*theirs.encode(text)]
    ]
    if ours.config.get("chat_template") != theirs.config.get("chat_template"):
        faults.append("the chat template")
    return faults


main = functools.partial(run_command, "export", __doc__, ExportFlags, export)


if __name__ == "__main__":
    leave(main())

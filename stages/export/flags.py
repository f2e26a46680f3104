"""The flags of `python -m stages.export`."""

import dataclasses
from pathlib import Path
from typing import Annotated

from stages.cli.flags import DeviceFlag, ModelFlag, VerboseFlag, default, one_of, parser, path

DTYPES = ("float32", "bfloat16", "float16", "q8_0")


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    """The model, the output path, and how weights are written."""

    out: Annotated[Path, parser(path, "PATH")]
    """A folder, or a file that ends in .gguf."""
    model: ModelFlag = None
    dtype: Annotated[str | None, one_of(*DTYPES), default("as loaded in a folder, float16 in a .gguf")] = None
    """float32, bfloat16, float16, or in a .gguf q8_0."""
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

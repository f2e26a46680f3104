"""The flags of `python -m stages.chat`."""

import dataclasses
from pathlib import Path
from typing import Annotated

from stages.cli.flags import DeviceFlag, ModelFlag, SamplingFlags, default, parser, path

SAMPLING = SamplingFlags(max_tokens=400, temperature=0.7, top_p=0.9)


@dataclasses.dataclass(frozen=True)
class ChatFlags:
    """The model, its adapters, the system message, and how tokens are sampled."""

    model: ModelFlag = None
    adapter: Annotated[tuple[Path, ...], default("none")] = ()
    """LoRA adapters that were trained on this model; several add up."""
    system: Annotated[str | None, parser(str, "TEXT"), default("the template's")] = None
    """The system message: how the model is to answer."""
    template: Annotated[Path | None, parser(path, "FILE"), default("the model's own")] = None
    """A chat template (Jinja) to use in place of the model's."""
    sampling: SamplingFlags = SAMPLING
    device: DeviceFlag = "auto"
    verbose: Annotated[bool, default("off")] = False
    """Say more on stderr: the cost of each turn, the digest of the weights, the traceback of an error."""

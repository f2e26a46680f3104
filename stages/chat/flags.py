"""The flags of `python -m stages.chat`."""

import dataclasses
from pathlib import Path
from typing import Annotated

from stages.cli.flags import CompletionFlags, DeviceFlag, ModelFlag, default, parser, path, with_help

DEFAULT_SAMPLING = {"temperature": 0.7, "top_p": 0.9}  # where neither a flag nor the model says it


@with_help(**{name: default(f"the model's, else {value}") for name, value in DEFAULT_SAMPLING.items()})
@dataclasses.dataclass(frozen=True)
class ChatSamplingFlags(CompletionFlags):
    """How tokens are sampled, in place of what the model recommends, and how many at most."""


@dataclasses.dataclass(frozen=True)
class ChatFlags:
    """The model, its adapters, the system message, and how tokens are sampled."""

    model: ModelFlag = None
    adapter: Annotated[tuple[Annotated[Path, parser(path, "FOLDER")], ...], default("none", metavar="FOLDER ...")] = ()
    """LoRA adapters that were trained on this model; several add up."""
    system: Annotated[str | None, parser(str, "TEXT"), default("the template's")] = None
    """The system message: how the model is to answer."""
    template: Annotated[Path | None, parser(path, "FILE"), default("the model's own")] = None
    """A chat template (Jinja) to use in place of the model's."""
    sampling: ChatSamplingFlags = ChatSamplingFlags(max_tokens=400)
    device: DeviceFlag = "auto"
    verbose: Annotated[bool, default("off")] = False
    """Say more on stderr: the cost of each turn, the digest of the weights, the traceback of an error."""

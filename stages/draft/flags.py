"""The flags of `python -m stages.draft`."""

import dataclasses
from pathlib import Path
from typing import Annotated

from stages.cli.flags import DeviceFlag, ModelFlag, VerboseFlag, default, parser, path, seconds


@dataclasses.dataclass(frozen=True)
class DraftFlags:
    """The model, its adapter, and how long it answers."""

    model: ModelFlag = None
    adapter: Annotated[Path | None, parser(path, "FOLDER"), default("none")] = None
    """The adapter with which the model will be served."""
    max_time: Annotated[float, parser(seconds, "TIME"), default("3m")] = 180.0
    """How long the model answers, once it is loaded and compiled."""
    device: DeviceFlag = "auto"
    verbose: VerboseFlag = False

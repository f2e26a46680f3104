"""The flags of `python -m stages.evaluate`, which scores a text or conversations."""

import dataclasses
from typing import Annotated

from stages.cli.flags import COUNT, DeviceFlag, ModelFlag, VerboseFlag, default, integer, parser
from stages.runs.flags import MeshFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """The model, the data, and the sliding window."""

    model: ModelFlag = None
    data: Annotated[str | None, parser(str, "TEXT"), default("what the run was validated on")] = None
    """A text (a name, whose held-out part is meant, a file or a folder), or conversations as `finetune` takes them."""
    context: Annotated[int | None, parser(integer(2), "N"), default("the model's context, at most 1,024")] = None
    """Tokens a window."""
    stride: Annotated[int | None, COUNT, default("half the window")] = None
    """Tokens between windows of a text: each token is predicted from at least context - stride before it."""
    batch: Annotated[int | None, COUNT, default("as many as fit in memory")] = None
    """Windows of a text scored together, on each device that shares the rows."""
    mesh: MeshFlags
    device: DeviceFlag = "auto"
    verbose: VerboseFlag = False

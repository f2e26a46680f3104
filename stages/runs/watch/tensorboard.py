"""Writes the numbers of metrics.jsonl as event files of TensorBoard, with the package of the extra `tensorboard`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError
from stages.runs.watch.recorder import Sink


@contextlib.contextmanager
def tensorboard_sink(folder: Path) -> Iterator[Sink]:
    """Yields a sink that writes into the folder. The first event's step says which steps of older files stay."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs tensorboardX: start the command with `uv run --extra tensorboard python -m ...`, or install "
            "the extra with `pip install -e '.[tensorboard]'`."
        ) from None
    writers: list[Any] = []

    def write(event: dict[str, Any]) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=event["step"] + 1, flush_secs=10))
        if event["event"] in ("step", "validation"):
            for name, value in event.items():
                if isinstance(value, (int, float)) and name != "step":
                    writers[0].add_scalar(name, value, event["step"])

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()

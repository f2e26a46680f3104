"""Accelerators by name: what `accelerators.csv` says of each, with its source."""

import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from engine.counting.collectives import Collective  # imports NumPy, which --help does without


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device: its peak of dense bfloat16 products, its memory, and the GB/s that it sends inside a node and beyond."""

    name: str
    bf16_tflops: float
    memory_gb: float
    memory_gbs: float
    node: int  # devices on a fast interconnect: of a machine, of a TPU pod
    node_gbs: float
    network_gbs: float
    source: str

    def send_seconds(self, collective: "Collective") -> float:
        """Predicts the seconds of a ring. One over several nodes has the network of all its devices in a node."""
        nodes = len({device // self.node for device in collective.group})
        network = self.network_gbs * len(collective.group) / nodes
        return collective.wire_bytes / (1e9 * (self.node_gbs if nodes == 1 else min(self.node_gbs, network)))


def find_accelerator(name: str) -> Accelerator:
    """Returns the accelerator of a name. Raises UserError for an unknown one."""
    rows = {row["name"]: row for row in csv.DictReader(Path(__file__).with_suffix(".csv").read_text().splitlines())}
    if name not in rows:
        raise UserError(f"There are figures of {', '.join(rows)}, not of {name!r}.{did_you_mean(name, [*rows])}")
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Accelerator)}
    return Accelerator(**{column: types[column](value) for column, value in rows[name].items()})

"""Accelerators by name: what `accelerators.csv` says of each, with its source; one accelerator a line.

Columns: `*_tflops` 1e12 operations a second; `memory_gb` 1e9 bytes; `memory_gbs`, `node_gbs` and
`network_gbs` 1e9 bytes a second, the last two one way, inside a node of `node` devices and beyond;
`usd_*` US dollars an hour. Each is a field below.
"""

import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from engine.counting.xla import Collective  # imports NumPy, which --help does without


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device: its peak of dense products, its memory, the GB/s that it sends inside a node and
    beyond, and its costs.

    A number is 0 where no source that was read has it.
    """

    name: str
    bf16_tflops: float
    memory_gb: float
    memory_gbs: float
    node: int  # devices on a fast interconnect: of a machine, of a TPU pod
    node_gbs: float
    network_gbs: float
    eight_bit_tflops: float  # of fp8, or of int8 where there is no fp8
    watts: float  # of a GPU its limit, of a TPU its measured mean
    usd_low: float  # an hour's rent
    usd_high: float
    source: str
    price_source: str = ""

    def send_seconds(self, collective: "Collective") -> float:
        """Predicts the seconds of a ring. A ring over several nodes has the networks of all
        its devices in a node together.
        """
        nodes = len({device // self.node for device in collective.group})
        speed = self.node_gbs
        if nodes > 1:
            speed = min(speed, self.network_gbs * len(collective.group) / nodes)
        return collective.wire_bytes / (1e9 * speed)


def read_accelerators() -> dict[str, Accelerator]:
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Accelerator)}
    rows = csv.DictReader(Path(__file__).with_suffix(".csv").read_text(encoding="utf-8").splitlines())
    accelerators = {}
    for row in rows:
        fields = {}
        for name, text in row.items():
            fields[name] = types[name](text) if text else types[name]()  # 0 or ""
        accelerators[row["name"]] = Accelerator(**fields)
    return accelerators


def find_accelerator(name: str) -> Accelerator:
    """Returns the accelerator of a name. Raises UserError for an unknown one, or one without a
    known network.
    """
    known = {name: device for name, device in read_accelerators().items() if device.network_gbs}
    if name not in known:
        raise UserError(
            f"There are figures of {', '.join(known)}, not of {name!r}.{did_you_mean(name, [*known])}"
        )
    return known[name]

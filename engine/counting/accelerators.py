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
        for field, text in row.items():
            if text:
                fields[field] = types[field](text)
            else:
                fields[field] = types[field]()  # 0 or ""
        accelerators[row["name"]] = Accelerator(**fields)
    return accelerators


def find_networked(name: str) -> Accelerator:
    """Returns the accelerator of a name, whose network is known. Raises UserError for one that is
    unknown, or whose network is.
    """
    accelerators = read_accelerators()
    networked = [known for known, accelerator in accelerators.items() if accelerator.network_gbs]
    if name not in networked:
        raise UserError(
            f"There are figures of {', '.join(networked)}, not of {name!r}.{did_you_mean(name, networked)}"
        )
    return accelerators[name]

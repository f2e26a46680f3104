"""Checks and measures a GPU or TPU in ten minutes: numbers beside a CPU's, MFU and MBU, compile times, peers.

    python -m bench.accelerator                           correctness, then 135M and 1.2B parameters
    python -m bench.accelerator --out report              also writes accelerator.html and accelerator.json, after each section
    python -m bench.accelerator --peer-python P/python    beside PyTorch and vLLM of that environment
    python -m bench.accelerator --device cpu --quick      rehearses all of it on the processor

Ceilings are measured in the same run: MFU is a share of this device's best matrix product, MBU of its best reading of memory.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bench.cli import Json, check_rounds, override_defaults, run_bench
from engine.device import start_jax
from engine.errors import UserError


@dataclasses.dataclass(frozen=True)
class AcceleratorFlags:
    presets: tuple[str, ...] = ("smollm2-135m", "llama-3.2-1b")
    """Architectures to measure, with random weights; each takes the largest batch that fits."""
    context: int = 2048
    """Tokens of a sequence, a multiple of 64; a preset with less takes its own."""
    device: Literal["auto", "cpu"] = "auto"
    """`cpu` rehearses on the processor."""
    price: float = 2.50
    """Dollars an hour of this machine."""
    rounds: int = 9
    """Interleaved rounds, at least 6; the median counts."""
    max_time: float = 600.0
    """Seconds in all, about; what would take longer is left out."""
    peer_python: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: this one)")] = None
    """The Python that has torch or vllm."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: no page)")] = None
    """A folder for accelerator.html and accelerator.json."""
    quick: bool = False
    """One small preset, six rounds, no peers."""


QUICK: Json = {"presets": ("nano",), "context": 128, "rounds": 6}


def measure_accelerator(flags: AcceleratorFlags) -> Json:
    """Runs the checks and measurements, prints them, writes the page of --out, and returns the document."""
    if flags.quick:
        flags = override_defaults(flags, QUICK)
    check_rounds(flags.rounds)
    if flags.context < 64 or flags.context % 64:
        raise UserError(f"--context must be a multiple of 64, the tokens of a prefill, not {flags.context}.")
    for name, value in (("price", flags.price), ("max-time", flags.max_time)):
        if not value > 0:
            raise UserError(f"--{name} must be a number above 0, not {value:g}.")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need memory too
    if (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms:
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # to compare with: the first that is named computes
    device = start_jax(flags.device)
    if device.backend == "cpu" and flags.device != "cpu":
        raise UserError(
            f"There is no GPU or TPU here that JAX can use ({device.reason}). --device cpu rehearses on the processor."
        )
    from bench.accelerator.report import print_document, write_page
    from bench.accelerator.run import run

    document = run(
        flags.presets, context=flags.context, rounds=flags.rounds, price=flags.price, max_time=flags.max_time,
        peers=not flags.quick, peer_python=flags.peer_python,
        save=lambda document: flags.out and write_page(flags.out, document),
    )  # fmt: skip
    print_document(document)
    if flags.out:
        print(f"the page: {flags.out / 'accelerator.html'}", file=sys.stderr)
    return document


def main(args: list[str] | None = None) -> int:
    """Prints the JSON document as the last line; returns 0, 1 if a check or a section fails, or 2 after an error
    that a person can mend."""
    documents: list[Json] = []

    def measure(flags: AcceleratorFlags) -> Json:
        documents.append(measure_accelerator(flags))
        return documents[-1]

    code = run_bench("bench.accelerator", __doc__, AcceleratorFlags, measure, args)
    return code or int(
        any(document["errors"] or not all(check["holds"] for check in document["checks"]) for document in documents)
    )


if __name__ == "__main__":
    sys.exit(main())

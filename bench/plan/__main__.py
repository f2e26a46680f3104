"""Answers before money is spent: will it fit, how long, how much, and with which error; without JAX.

    python -m bench.plan --model llama-3.2-1b --tokens 100B --hardware h100 --devices 8
    python -m bench.plan --model llama-3.2-1b --tokens 10M --method lora:16 --hardware rtx-4090
    python -m bench.plan --model llama-3.2-1b --requests 20 --prompt 1000 --answer 250 --hardware l4
    python -m bench.plan --budget 500 --devices 8           the largest compute-optimal model; or --days 7
    python -m bench.plan --model llama-3.2-1b --extra 2000  a longer prompt, or tuning, or training?
    python -m bench.plan --validate                         replays published runs, each left out
    python -m bench.plan --calibrate                        measures this machine for --hardware here, in 30 seconds

Every line says where its interval comes from. --out writes a page whose sliders compute the same in
the browser.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bench.cli import run_bench
from bench.machine import Json
from engine.errors import UserError

NumberText = Annotated[str | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = None
    """A preset, a config.json or its folder, a .gguf file, or a run folder."""
    params: NumberText = None
    """Parameters of a Llama, such as 8B, in place of a model."""
    tokens: NumberText = None
    """Tokens to train on, such as 100B; with --extra, to tune on (default: 10M)."""
    method: str = "pretrain"
    """pretrain, full, freeze:K, lora:R, qlora:R, preference or rl: K blocks from the bottom, R the rank."""
    context: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: 4096, or the model's)")] = None
    """Tokens of a text in training."""
    hardware: str = "h100"
    """A name in engine/counting/accelerators.csv; here, once calibrated; or custom, with --peak, --bandwidth and --memory."""
    devices: int = 1
    """Devices of the run, or of one replica in serving."""
    requests: NumberText = None
    """Requests a second to serve."""
    prompt: Annotated[str, tyro.conf.arg(metavar="NUMBER")] = "1000"
    """Tokens of a request's prompt."""
    answer: Annotated[str, tyro.conf.arg(metavar="NUMBER")] = "250"
    """Tokens of its answer."""
    cached: float = 0.0
    """Share of a prompt that the prefix cache holds, from 0 to below 1."""
    precision: Literal["bfloat16", "int8", "int4"] = "bfloat16"
    """Of the weights in serving; with int8, of the KV cache too."""
    budget: NumberText = None
    """Dollars to spend."""
    days: Number = None
    """Days to train for."""
    extra: NumberText = None
    """Tokens to put before each prompt, or into the weights."""
    peak: Number = None
    """TFLOP/s of a device's bfloat16 products."""
    bandwidth: Number = None
    """GB/s of its memory."""
    memory: Number = None
    """GB of its memory."""
    price: Number = None
    """Dollars of a device-hour."""
    watts: Number = None
    """Watts of a device."""
    validate: bool = False
    """Replay the published runs and print the errors."""
    calibrate: bool = False
    """Measure this machine."""
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="")] = None
    """A folder for plan.html and plan.json."""


def plan(flags: PlanFlags) -> Json:
    """Answers the question that the flags ask, and prints it. Raises UserError for impossible or
    missing numbers.
    """
    check_flags(flags)
    if flags.calibrate:
        from bench.plan.hardware import calibrate

        return calibrate()
    if flags.validate:
        from bench.plan.validate import show, validation

        document = validation()
        show(document)
        return document
    return answer(flags)


def check_flags(flags: PlanFlags) -> None:
    """Raises UserError for numbers that cannot be, questions that exclude each other."""
    for name in ("days", "peak", "bandwidth", "memory", "price", "watts", "devices", "context"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < 1e9:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and below a billion, not {value:g}.")
    if not 0 <= flags.cached < 1:
        raise UserError(f"--cached is a share from 0 to below 1, such as 0.8, not {flags.cached:g}.")
    if flags.model and flags.params:
        raise UserError("--model and --params name two models; give one of them.")
    asked = [
        f"--{name}"
        for name in ("requests", "budget", "days", "extra", "validate", "calibrate")
        if getattr(flags, name)
    ]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different questions; ask one at a time.")
    if flags.method != "pretrain" and asked:
        raise UserError(f"--method belongs to --tokens; {asked[0]} asks about no one method of training.")
    if (flags.budget or flags.days) and (flags.model or flags.params):
        raise UserError("--budget and --days choose the model: leave --model and --params out.")
    if flags.out and (flags.validate or flags.calibrate):
        raise UserError(
            "--out writes the page of a question, with all validation on it; "
            "--validate and --calibrate ask none."
        )


def answer(flags: PlanFlags) -> Json:
    """Prints and returns the answer to one question; with --out, what its page computes with too."""
    from bench.plan.fits import device_numbers
    from bench.plan.hardware import accelerators, find_hardware
    from bench.plan.model import job, read_model
    from bench.plan.plans import amount, plan_break_even, plan_budget, plan_serving, plan_training

    given = {
        "bf16_tflops": flags.peak,
        "memory_gbs": flags.bandwidth,
        "memory_gb": flags.memory,
        "watts": flags.watts,
    }
    device = find_hardware(flags.hardware, given | {"price": flags.price})

    def read(name: str) -> float:
        return amount(f"--{name.replace('_', '-')}", getattr(flags, name))

    def optional(name: str) -> float | None:
        return read(name) if getattr(flags, name) else None

    d = device_numbers(device)
    lengths = (read("prompt"), read("answer"), flags.cached)
    about_model = not (flags.budget or flags.days)
    name, cfg = read_model(
        flags.model or (None if about_model or flags.params else "llama-3.2-1b"), optional("params")
    )
    longest = sum(lengths[:2]) + (read("extra") if flags.extra else 0)
    if (flags.requests or flags.extra) and longest > cfg.context:
        raise UserError(
            f"Prompt and answer take {longest:,.0f} tokens; {name} has a context of {cfg.context:,}."
        )
    context = flags.context or min(4096, cfg.context)
    make = functools.partial(job, cfg, context=context)
    m = make(flags.method)
    if not about_model:
        result = plan_budget(d, flags.devices, optional("budget"), flags.days or 0)
    elif flags.requests:
        result = plan_serving(
            name, m, d, flags.devices, requests=read("requests"), lengths=lengths, precision=flags.precision
        )
    elif flags.extra:
        tuning = optional("tokens") or 1e7
        tokens = {"lora:16": tuning, "full": tuning, "pretrain": 20.0 * m.params}
        investments = {
            method: plan_training(name, method, make(method), d, amount, flags.devices).lines["device-hours"]
            for method, amount in tokens.items()
        }
        result = plan_break_even(name, m, d, read("extra"), lengths, flags.precision, tuning, investments)
    else:
        result = plan_training(name, flags.method, m, d, read("tokens"), flags.devices)
    result.print()
    document = result.document()
    if flags.out:
        from bench.plan.page import sliders
        from bench.plan.validate import validation
        from engine.model.config import PRESETS

        devices = {each.name: device_numbers(each) for each in accelerators().values()} | {device.name: d}
        asked = ("tokens", "requests", "prompt", "answer", "extra")
        state = {"model": name, "hardware": device.name, "cached": flags.cached, "precision": flags.precision}
        state |= {"replica" if flags.requests else "devices": flags.devices}
        state |= {each: read(each) for each in asked if getattr(flags, each)}
        document |= {"validation": validation(), "sliders": sliders({name: cfg} | PRESETS, devices, state)}
    return document


def write_pages(source: Path, document: Json) -> Path:
    from bench.plan.page import write_plan  # imports NumPy, as --help need not

    return write_plan(source, document)


if __name__ == "__main__":
    sys.exit(run_bench("bench.plan", __doc__, PlanFlags, plan, write_pages=write_pages))

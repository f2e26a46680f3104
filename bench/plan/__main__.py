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
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bench.cli import run_bench
from bench.machine import Json
from engine.errors import UserError
from engine.model.config import PRESETS, ModelConfig

if TYPE_CHECKING:  # imports NumPy, as --help need not
    from bench.plan.fits import PlannedDevice
    from bench.plan.plans import PlannedAnswer

NumberText = Annotated[str | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]
Lengths = tuple[float, float, float]  # tokens of prompt and answer, and the cached share of prompts

QUESTIONS = ("requests", "budget", "days", "extra", "validate", "calibrate")  # flags that ask one each
DEFAULT_CONTEXT = 4096
TUNING_TOKENS = 1e7
TOKENS_A_PARAMETER = 20.0  # of pre-training, compared with a longer prompt
PAGE_MODEL = "llama-3.2-1b"


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
    questions = [f"--{name}" for name in QUESTIONS if getattr(flags, name)]
    if len(questions) > 1:
        raise UserError(f"{' and '.join(questions)} are different questions; ask one at a time.")
    if flags.method != "pretrain" and questions:
        raise UserError(f"--method belongs to --tokens; {questions[0]} asks about no one method of training.")
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
    from bench.plan.hardware import find_hardware

    fields = {
        "bf16_tflops": flags.peak,
        "memory_gbs": flags.bandwidth,
        "memory_gb": flags.memory,
        "watts": flags.watts,
        "price": flags.price,
    }
    d = device_numbers(find_hardware(flags.hardware, fields))
    lengths = (read_amount(flags, "prompt"), read_amount(flags, "answer"), flags.cached)
    name, cfg = find_model(flags)
    check_lengths(flags, name, cfg, lengths)
    result = plan_question(flags, name, cfg, d, lengths)
    result.print()
    document = result.document()
    if flags.out:
        document |= page_document(flags, name, cfg, d)
    return document


def read_amount(flags: PlanFlags, field: str) -> float:
    """Returns the number of a flag. Raises UserError, naming it, where it is missing or is none."""
    from bench.plan.plans import amount

    return amount(f"--{field.replace('_', '-')}", getattr(flags, field))


def find_model(flags: PlanFlags) -> tuple[str, ModelConfig]:
    """Returns the name and architecture of the model that is asked about. --budget and --days ask
    about none: the page begins with PAGE_MODEL then.
    """
    from bench.plan.model import read_model

    if flags.budget or flags.days:
        return read_model(PAGE_MODEL, None)
    params = read_amount(flags, "params") if flags.params else None
    return read_model(flags.model or None, params)


def check_lengths(flags: PlanFlags, name: str, cfg: ModelConfig, lengths: Lengths) -> None:
    """Raises UserError for a request that is longer than the model's context."""
    prompt, answer, _ = lengths
    longest = prompt + answer
    if flags.extra:
        longest += read_amount(flags, "extra")
    if (flags.requests or flags.extra) and longest > cfg.context:
        raise UserError(
            f"Prompt and answer take {longest:,.0f} tokens; {name} has a context of {cfg.context:,}."
        )


def plan_question(
    flags: PlanFlags, name: str, cfg: ModelConfig, d: "PlannedDevice", lengths: Lengths
) -> "PlannedAnswer":
    """Returns the answer to the question that the flags ask, about a model on devices d."""
    from bench.plan import plans
    from bench.plan.model import job

    make_job = functools.partial(job, cfg, context=flags.context or min(DEFAULT_CONTEXT, cfg.context))
    m = make_job(flags.method)
    if flags.budget or flags.days:
        dollars = read_amount(flags, "budget") if flags.budget else None
        return plans.plan_budget(d, flags.devices, dollars, flags.days or 0)
    if flags.requests:
        requests = read_amount(flags, "requests")
        return plans.plan_serving(
            name, m, d, flags.devices, requests=requests, lengths=lengths, precision=flags.precision
        )
    if flags.extra:
        tuning = read_amount(flags, "tokens") if flags.tokens else TUNING_TOKENS
        tokens = {"lora:16": tuning, "full": tuning, "pretrain": TOKENS_A_PARAMETER * m.params}
        investments = {}
        for method, count in tokens.items():
            training = plans.plan_training(name, method, make_job(method), d, count, flags.devices)
            investments[method] = training.lines["device-hours"]
        extra = read_amount(flags, "extra")
        return plans.plan_break_even(name, m, d, extra, lengths, flags.precision, tuning, investments)
    return plans.plan_training(name, flags.method, m, d, read_amount(flags, "tokens"), flags.devices)


def page_document(flags: PlanFlags, name: str, cfg: ModelConfig, d: "PlannedDevice") -> Json:
    """Returns what the page shows besides the answer: the validation, and the numbers of its sliders."""
    from bench.plan.fits import device_numbers
    from bench.plan.hardware import accelerators
    from bench.plan.page import sliders
    from bench.plan.validate import validation

    devices = {each.name: device_numbers(each) for each in accelerators().values()} | {d.name: d}
    state: Json = {
        "model": name,
        "hardware": d.name,
        "cached": flags.cached,
        "precision": flags.precision,
        "replica" if flags.requests else "devices": flags.devices,
    }
    for field in ("tokens", "requests", "prompt", "answer", "extra"):
        if getattr(flags, field):
            state[field] = read_amount(flags, field)
    return {"validation": validation(), "sliders": sliders({name: cfg} | PRESETS, devices, state)}


def write_pages(source: Path, document: Json) -> Path:
    from bench.plan.page import write_plan  # imports NumPy, as --help need not

    return write_plan(source, document)


if __name__ == "__main__":
    sys.exit(run_bench("bench.plan", __doc__, PlanFlags, plan, write_pages=write_pages))

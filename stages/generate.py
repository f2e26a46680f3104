"""Generate text: continue a prompt, printed as it is sampled.

    python -m stages.generate --prompt "ROMEO:"
    python -m stages.generate --model runs/demo-shakespeare --count 3 --temperature 1.0 < /dev/null
    echo "To be, or" | python -m stages.generate --prompt -

Text goes to standard output, everything else to standard error.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from engine.device import Device, host_memory, start_jax
from engine.errors import UserError
from engine.format import duration
from engine.inference.request import Request, SamplingParams
from stages.cli import command, signals
from stages.cli.command import leave, run_command
from stages.cli.console import Console
from stages.cli.flags import (
    CompletionFlags,
    DeviceFlag,
    MeshFlag,
    ModelFlag,
    WeightsFlag,
    default,
    integer,
    parser,
)
from stages.cli.sampling import choose_sampling

if TYPE_CHECKING:
    from engine.model.config import ModelConfig
    from engine.text.detokenizer import CompletionText
    from engine.text.tokenizer import Tokenizer

TEMPERATURE = 0.8  # where neither a flag nor the model says one
CAPACITY_MULTIPLE = 256  # of a KV cache's capacity, in tokens


@dataclasses.dataclass(frozen=True)
class GenerateFlags:
    """The model, the prompt, and how tokens are sampled."""

    model: ModelFlag = None
    prompt: Annotated[str | None, parser(str, "TEXT"), default("a line end")] = None
    """The text to continue; `-` reads it from standard input."""
    sampling: CompletionFlags = dataclasses.field(default_factory=CompletionFlags)
    count: Annotated[int, parser(integer(1, 256), "N")] = 1
    """Continuations to write, with seeds seed, seed + 1, ..."""
    weights: WeightsFlag = None
    mesh: MeshFlag = None
    device: DeviceFlag = "auto"
    verbose: Annotated[bool, default("off")] = False
    """Say more on stderr: the model, its digest before and after, the traceback of an error."""


def generate(flags: GenerateFlags) -> None:
    if flags.mesh and flags.weights == "q4":
        raise UserError("--weights q4 is for one device; leave --mesh out.")
    signals.set_phase("before the text was complete.")
    device = start_jax(flags.device, one_arena=False)
    # These import JAX, here and below, which must be started first.
    import jax

    from engine.mesh.layout import make_inference_mesh

    with jax.set_mesh(make_inference_mesh(flags.mesh)):
        _generate(flags, device)


def _generate(flags: GenerateFlags, device: Device) -> None:
    from engine.inference.config import EngineConfig
    from engine.mesh import layout
    from engine.model.ops import kernels_note
    from engine.model.weights.convert import describe_weights
    from engine.storage.digest import describe_digests, digest
    from engine.storage.kinds_in_words import describe_kinds
    from engine.storage.model_loader import load_model

    notes = Console(sys.stderr)
    mesh = layout.current_mesh()
    on_mesh = mesh is not None
    check = functools.partial(layout.check_inference, mesh=mesh)
    config = EngineConfig(weights=flags.weights)  # type: ignore[arg-type]
    with host_memory(on_mesh):
        model = load_model(
            flags.model, dtype=config.dtype_of_file, on_config=check, keep_kinds=config.kept_kinds
        )
    notes.print_notes(*model.notes)
    prompt = _prompt_tokens(flags.prompt, model.tokenizer)
    with host_memory(on_mesh):
        cfg = config.model_config(model.cfg)
        params = config.prepare_params(cfg, model.params, not on_mesh)
    params = layout.place(params)
    model = dataclasses.replace(model, cfg=cfg, params=None)  # weights once
    fields, source = choose_sampling(
        model.sampling, flags.sampling.overrides, {"temperature": TEMPERATURE}, notes
    )
    sampling = SamplingParams(
        flags.sampling.max_tokens, seed=flags.sampling.seed, stop_token_ids=model.eos_ids, **fields
    )
    before = ""
    settings = [
        ("weights", describe_weights(params)),
        ("file", describe_kinds(model.kinds, params)),
        ("sampling", source),
    ]
    if flags.verbose:
        before = digest(params)
        settings += [
            ("device", f"{device}{kernels_note()}"),
            ("model", str(model)),
            ("digest", f"SHA-256 {before[:16]}"),
        ]
    notes.print_rows(settings)
    generation = print_continuations(model.cfg, params, model.tokenizer, prompt, sampling, flags.count)
    notes.print(f"\n{generation.describe()}")
    if before:
        notes.print(describe_digests(before, digest(params)))


def _prompt_tokens(text: str | None, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Returns the tokens of the prompt, which `-` reads from standard input: a line end for none."""
    from engine.files import decode_utf8

    if text == "-":
        text = decode_utf8(sys.stdin.buffer.read(), "The prompt on standard input")
    return (*tokenizer.bos_ids, *tokenizer.encode(text or "\n").tolist())


class Generation(NamedTuple):
    """What continuations of a prompt have taken. Moments are those of `time.perf_counter`."""

    begin: float
    first: float  # when the first token came
    tokens: int
    # Tokens a second once each program had run; None where nothing came after that.
    speed: float | None
    recompiles: int  # since then
    full_context: int  # tokens of the context that a continuation has filled, 0 where none has

    def describe(self) -> str:
        speed = ""
        if self.speed is not None:
            speed = f"{self.speed:,.0f} tokens/s, "
        cut = ""
        if self.full_context:
            cut = f"; the context of {self.full_context} tokens is full"
        return (
            f"{self.tokens:,} tokens, the first {duration(self.first - self.begin)} after the prompt and "
            f"{duration(self.first - command.process_start())} after the command, "
            f"{speed}{self.recompiles} recompiles{cut}"
        )


def print_continuations(
    cfg: "ModelConfig",
    params: Any,
    tokenizer: "Tokenizer",
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    count: int,
) -> Generation:
    """Prints `count` continuations of the tokens of a prompt as they are sampled."""
    from engine.counting.xla import CompileCounter
    from engine.inference.config import EngineConfig
    from engine.inference.engine import Engine
    from engine.text.detokenizer import CompletionText

    begin = time.perf_counter()
    compiles = CompileCounter()
    printer = ContinuationPrinter([CompletionText(tokenizer.stream()) for _ in range(count)])
    # The capacity is one of few, so that another prompt compiles nothing.
    multiples = math.ceil((len(prompt) + sampling.max_tokens) / CAPACITY_MULTIPLE)
    capacity = min(cfg.context, multiples * CAPACITY_MULTIPLE)
    engine = Engine(cfg, params, EngineConfig.for_prompts(cfg, [prompt] * count, capacity))
    engine.runner.begin_compiling()
    requests = [Request(prompt, row.within(capacity - len(prompt))) for row in sampling.per_row(count)]
    rows = {engine.submit(request): index for index, request in enumerate(requests)}
    first = begin
    last = begin  # when the last token came
    tokens = 0
    settled = begin  # when each program had run
    settled_tokens = 0  # until then
    full_context = 0
    begun: set[int] = set()  # the requests that have a token
    while engine.busy:
        is_settled = len(begun) == count  # each program has run: nothing may compile any more
        for event in engine.step():
            last = time.perf_counter()
            if not begun:
                first = last
            begun.add(event.id)
            length = printer.write(rows[event.id], event.tokens, event.finish_reason)
            tokens += len(event.tokens)
            is_cut = event.finish_reason == "length" and length < sampling.max_tokens
            if is_cut and len(prompt) + length >= cfg.context:
                full_context = cfg.context
        if not is_settled:
            settled = last
            settled_tokens = tokens
            compiles.reset()
    speed = None
    if last > settled:
        speed = (tokens - settled_tokens) / (last - settled)
    return Generation(begin, first, tokens, speed, compiles.count, full_context)


class ContinuationPrinter:
    """Prints continuations in order: one as it comes, those behind it once it is complete."""

    def __init__(self, completions: Sequence["CompletionText"]) -> None:
        self.completions = completions
        self.waiting = [""] * len(completions)
        self.is_complete = [False] * len(completions)
        self.current = 0

    def write(self, index: int, tokens: Sequence[int], finish_reason: str | None) -> int:
        """Prints the text that is next, and returns how many tokens this continuation has."""
        completion = self.completions[index]
        count = len(self.completions)
        self.waiting[index] += completion.push(tokens, last=finish_reason is not None)
        self.is_complete[index] = finish_reason is not None
        text = ""
        while self.current < count:
            text += self.waiting[self.current]
            self.waiting[self.current] = ""
            if not self.is_complete[self.current]:
                break
            self.current += 1
            text += "\n"
            if self.current < count:
                text += f"\n--- {self.current + 1} of {count}\n"
        print(text, end="", flush=True)
        return completion.tokens


main = functools.partial(run_command, "generate", __doc__, GenerateFlags, generate, one_arena=False)


if __name__ == "__main__":
    leave(main())

"""Let a model write: its continuation of a prompt, as it comes.

    python -m stages.generate --prompt "ROMEO:"
    python -m stages.generate --model runs/demo-shakespeare --count 3 --temperature 1.0 < /dev/null
    echo "To be, or" | python -m stages.generate --prompt -

Text goes to standard output, everything else to standard error.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from engine.inference.sampling_params import RANGES, SamplingParams
from stages.cli.command import run_command
from stages.cli.flags import DeviceFlag, ModelFlag, VerboseFlag, default, in_range, integer, parser

ROOM = 256  # tokens a cache is a multiple of

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generate:
    """A model, a prompt, and how tokens are drawn."""

    model: ModelFlag = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or a named model."""
    prompt: Annotated[str | None, parser(str, "TEXT"), default("a line end")] = None
    """What to go on from; `-` reads it from standard input."""
    max_tokens: Annotated[int, parser(in_range(RANGES["max_tokens"]), "N")] = 200
    """Tokens to write at most."""
    temperature: Annotated[float, parser(in_range(RANGES["temperature"]), "X")] = 0.8
    """0 takes the most probable token each time; higher is more varied."""
    top_k: Annotated[int, parser(in_range(RANGES["top_k"]), "N"), default("0, all")] = 0
    """Draw from the N most probable tokens."""
    top_p: Annotated[float, parser(in_range(RANGES["top_p"]), "X"), default("1, all")] = 1.0
    """Draw from the fewest tokens that together have this probability."""
    min_p: Annotated[float, parser(in_range(RANGES["min_p"]), "X"), default("0, all")] = 0.0
    """Draw from tokens at least this share as probable as the best."""
    seed: Annotated[int, parser(in_range(RANGES["seed"]), "N")] = 0
    """The same seed draws the same text."""
    count: Annotated[int, parser(integer(1, 256), "N")] = 1
    """Continuations to write, with seeds seed, seed + 1, ..."""
    device: DeviceFlag = "auto"
    """auto, cpu, gpu or tpu."""
    verbose: VerboseFlag = False
    """Say more on stderr: the model, its digest before and after, the traceback of an error."""


def generate(given: Generate) -> None:
    """Text goes to stdout as it comes, everything else to stderr."""
    from engine import format as words
    from engine.device import start_jax
    from stages.cli import process, signals

    signals.set_phase("before the text was complete.")
    started = start_jax(given.device, decodes=True)
    from engine.inference import decode
    from engine.storage.find import load_model
    from stages.cli.compile_counter import CompileCounter
    from stages.cli.console import Console

    notes = Console(sys.stderr)
    model = load_model(given.model)
    notes.warn_damaged(model.damaged, model.checkpoint)
    prompt = [*model.tokenizer.start, *_prompt(given.prompt, model.tokenizer)]
    params = decode.for_inference(model.cfg, model.params)
    sampling = SamplingParams(
        max_tokens=given.max_tokens, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p,
        min_p=given.min_p, seed=given.seed, stop_token_ids=model.ends,
    )  # fmt: skip
    before = None
    if given.verbose:
        from engine.storage.digest import digest

        before = digest(params)
        notes.print_rows([("device", str(started)), ("model", str(model.checkpoint)), ("weights", f"SHA-256 {before[:16]}")])

    begin = time.perf_counter()
    compiles = CompileCounter()
    writer = Writer(model.tokenizer, given.count)
    stream = decode.generate(
        model.cfg, params, [prompt] * given.count, sampling.per_row(given.count),
        capacity=_capacity(len(prompt) + given.max_tokens, model.cfg.context),
    )  # fmt: skip
    first = settled = last = begin
    early = 0
    for index, tokens, finished in stream:
        last = time.perf_counter()
        if not writer.total:
            first = last
        writer.take(index, tokens, finished)
        if settled == begin and writer.total > given.count:
            # Prefill, the first draw and a dispatch of decoding have each run once: from here on nothing may compile.
            settled, early = last, writer.total
            compiles.reset()
    speed = f"{(writer.total - early) / (last - settled):,.0f} tokens/s, " if last > settled else ""
    full = writer.full(len(prompt), given.max_tokens, model.cfg.context)
    cut = f"; the context of {model.cfg.context} tokens is full" if full else ""
    notes.print(
        f"\n{writer.total:,} tokens, the first {words.duration(first - begin)} after the prompt and "
        f"{words.duration(first - process.process_start())} after the command, {speed}{compiles.count} recompiles{cut}"
    )
    if before:
        after = digest(params)
        notes.print(f"weights {'unchanged' if before == after else 'CHANGED'}: SHA-256 {after[:16]} before and after")


def _capacity(wanted: int, context: int) -> int:
    """Tokens to keep room for: each step reads all of it. One of few sizes, so that another prompt compiles nothing."""
    return min(context, -(-wanted // ROOM) * ROOM)


def _prompt(given: str | None, tokenizer: "Tokenizer") -> list[int]:
    """The tokens to go on from. A model without a prompt begins after a line end, where texts begin."""
    from engine.errors import UserError

    text = "\n" if given is None else given
    if given == "-":
        data = sys.stdin.buffer.read()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"The prompt on standard input is not UTF-8: byte 0x{data[error.start]:02X} at position {error.start}."
            ) from None
    return tokenizer.encode(text or "\n").tolist()


class Writer:
    """Prints one continuation as it comes and holds back those behind it until it is complete."""

    def __init__(self, tokenizer: "Tokenizer", count: int) -> None:
        self.streams = [tokenizer.stream() for _ in range(count)]
        self.held: list[str] = [""] * count
        self.lengths = [0] * count
        self.reasons: list[str | None] = [None] * count
        self.at = 0

    @property
    def total(self) -> int:
        """Tokens of all continuations."""
        return sum(self.lengths)

    def take(self, index: int, tokens: Sequence[int], finished: str | None) -> None:
        """New tokens of one continuation."""
        self.lengths[index] += len(tokens)
        stream = self.streams[index]
        self.held[index] += "".join(map(stream.push, tokens)) + (stream.close() if finished else "")
        self.reasons[index] = finished
        print("".join(self._ready()), end="", flush=True)

    def _ready(self) -> Iterator[str]:
        while self.at < len(self.held):
            yield self.held[self.at]
            self.held[self.at] = ""
            if not self.reasons[self.at]:
                return
            self.at += 1
            yield "\n" if self.at == len(self.held) else f"\n\n--- {self.at + 1} of {len(self.held)}\n"

    def full(self, prompt: int, wanted: int, context: int) -> bool:
        """Whether one ended because the context was full, before it had all its tokens."""
        return any(
            reason == "length" and length < wanted and prompt + length >= context
            for reason, length in zip(self.reasons, self.lengths)
        )


def main(args: Sequence[str] | None = None) -> int:
    return run_command("generate", __doc__, Generate, generate, args)


if __name__ == "__main__":
    sys.exit(main())

r"""Chat with a model in the terminal, turn by turn.

    python -m stages.chat --model smollm2-135m-instruct
    python -m stages.chat --model smollm2-135m-instruct --adapter runs/smollm2-135m-instruct-voice --system "Answer briefly."
    python -m stages.chat --model smollm2-135m-instruct --documents notes
    printf 'Hello\nWhat is a tide?\n' | python -m stages.chat --model smollm2-135m-instruct

A model remembers nothing between turns: each time it reads the whole conversation again, and what
that costs is printed. `/clear` begins a new conversation, `/system TEXT` changes the system
message, `/quit` leaves; a message that begins with a slash begins with two. Without a terminal,
every line that comes in is a turn. The conversation, each question above its answer, goes to
standard output, everything else to standard error.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import contextlib
import dataclasses
import datetime
import functools
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from engine.device import Device, start_jax
from engine.errors import UserError
from engine.format import duration, in_words, join_words, si
from engine.inference.request import Event, Request, SamplingParams
from engine.mesh.processes import MISTAKE
from stages.cli import signals
from stages.cli.command import leave, run_command
from stages.cli.console import Console
from stages.cli.flags import (
    CompletionFlags,
    DeviceFlag,
    DocumentsFlag,
    ModelFlag,
    TemplateFlag,
    WeightsFlag,
    default,
    parser,
    path,
)
from stages.cli.sampling import choose_sampling

if TYPE_CHECKING:
    from engine.inference.engine import Engine
    from engine.model.config import ModelConfig
    from engine.storage.model_loader import LoadedModel
    from engine.text.chat_tokenizer import ChatTokenizer
    from engine.text.documents import Documents, Passage

DEFAULT_SAMPLING = {"temperature": 0.7, "top_p": 0.9}  # where neither a flag nor the model says it
MIN_CAPACITY = 512  # of a KV cache; doubled as needed: few programs


@dataclasses.dataclass(frozen=True)
class ChatFlags:
    """The model, its adapters, the system message, and how tokens are sampled."""

    model: ModelFlag = None
    adapter: Annotated[
        tuple[Annotated[Path, parser(path, "FOLDER")], ...], default("none", metavar="FOLDER ...")
    ] = ()
    """LoRA adapters that were trained on this model; several add up."""
    system: Annotated[str | None, parser(str, "TEXT"), default("the template's")] = None
    """The system message: how the model is to answer."""
    template: TemplateFlag = None
    documents: DocumentsFlag = None
    weights: WeightsFlag = None
    sampling: CompletionFlags = dataclasses.field(default_factory=lambda: CompletionFlags(max_tokens=400))
    device: DeviceFlag = "auto"
    verbose: Annotated[bool, default("off")] = False
    """Say more on stderr: the cost of each turn, the digest of the weights, the traceback of an error."""


def chat(flags: ChatFlags) -> int:
    """Replies to lines until they end. Returns exit code 0, or 2 when a turn from a pipe failed."""
    signals.set_phase("before a turn was begun.")
    device = start_jax(flags.device, one_arena=False)
    # These import JAX, here and below, which must be started first.
    from engine.storage.digest import describe_digests, digest
    from engine.text.chat_tokenizer import ChatTokenizer
    from engine.text.documents import Documents
    from engine.text.template import read_template

    notes = Console(sys.stderr)
    terminal = sys.stdin.isatty()
    chatty = terminal or flags.verbose
    template = read_template(flags.template)
    documents = None
    if flags.documents:
        documents = Documents(flags.documents)
    model = _load(flags, notes)
    now = datetime.datetime.now().isoformat(timespec="seconds")
    tokenizer = ChatTokenizer(model.tokenizer, template, now)
    fields, source = choose_sampling(model.sampling, flags.sampling.overrides, DEFAULT_SAMPLING, notes)
    session = ChatSession(
        cfg=model.cfg,
        params=model.params,
        chat=tokenizer,
        eos_ids=model.eos_ids,
        sampling=SamplingParams(flags.sampling.max_tokens, seed=flags.sampling.seed, **fields),
        system=flags.system or "",
        documents=documents,
    )
    if documents:
        notes.print_notes(documents.note)
    if chatty:
        before = digest(model.params)
        notes.print_rows(
            _banner_rows(flags, device, model, session, sampling_source=source, digest_before=before)
        )
    with notes.task("compiling", always=terminal):
        session.warm()
    if terminal:
        notes.print(
            "Type to talk. /clear begins anew, /system TEXT says how to answer, /quit or Ctrl-D leaves.\n",
            "dim",
        )
    try:
        is_whole = _talk(session, notes, terminal, chatty)
    finally:
        tokenizer.close()
    if not is_whole:
        return MISTAKE
    if chatty:
        notes.print(describe_digests(before, digest(model.params)))
    return 0


def _load(flags: ChatFlags, notes: Console) -> "LoadedModel":
    """Loads the model with its adapters merged in, prepared for inference."""
    from engine.inference.config import EngineConfig
    from engine.storage.model_loader import load_model, with_adapters

    config = EngineConfig(weights=flags.weights)  # type: ignore[arg-type]
    keep_kinds = config.kept_kinds
    if flags.adapter:
        keep_kinds = ()  # an adapter is merged into weights in a float type
    with notes.task(f"loading {flags.model or 'the newest finished run'}") as report:
        model = load_model(flags.model, dtype=config.dtype_of_file, report=report, keep_kinds=keep_kinds)
    params, adapter_notes = with_adapters(model.cfg, model.params, flags.adapter)
    notes.print_notes(*model.notes, *adapter_notes)
    cfg = config.model_config(model.cfg)
    # The weights as they were loaded are let go.
    return dataclasses.replace(model, cfg=cfg, params=config.prepare_params(cfg, params))


def _banner_rows(
    flags: ChatFlags,
    device: Device,
    model: "LoadedModel",
    session: "ChatSession",
    *,
    sampling_source: str,
    digest_before: str,
) -> list[tuple[str, str]]:
    from engine.model.ops import kernels_note
    from engine.model.weights.convert import describe_weights
    from engine.storage.kinds_in_words import describe_kinds

    name = str(model)
    if flags.adapter:
        name += f" with {join_words([*map(str, flags.adapter)])}"
    documents = ""
    if session.documents:
        documents = session.documents.summary
    return [
        ("model", name),
        ("file", describe_kinds(model.kinds, model.params)),
        ("device", f"{device}{kernels_note()}"),
        ("template", session.chat.template_name),
        ("documents", documents),
        ("sampling", sampling_source),
        ("weights", f"{describe_weights(model.params)}, SHA-256 {digest_before[:16]}"),
        ("context", f"{model.cfg.context:,} tokens"),
    ]


def _talk(session: "ChatSession", notes: Console, terminal: bool, chatty: bool) -> bool:
    """Replies to lines until they end, or a turn from a pipe fails. Returns whether none did."""
    if terminal:
        lines = _typed_lines(notes)
    else:
        lines = _piped_lines()
    for line in lines:
        if line.strip() == "/quit":
            break
        try:
            if line.startswith("/") and not line.startswith("//"):
                notes.print(f"[{session.execute(line)}]", "dim")
            elif line.strip():
                message = line.removeprefix("/")
                if not terminal:  # nobody typed it on this screen
                    print(f"> {message}", flush=True)
                session.reply(message, notes, chatty)
                if not terminal:
                    print(flush=True)
        except UserError as error:
            notes.print(f"error: {error}", "red")
            if not terminal:
                return False
    return True


def _typed_lines(notes: Console) -> Iterator[str]:
    """Yields lines from a person.

    Ctrl-C drops a line, Ctrl-D ends; after a backslash a line goes on in the next.
    """
    with contextlib.suppress(ImportError):
        import readline  # gives input() editing and history

        if os.environ.get("TERM", "dumb") != "dumb":
            # A paste is one message; Python turns this off.
            readline.parse_and_bind("set enable-bracketed-paste on")
    begun = ""
    while True:
        prompt = "... " if begun else "> "
        try:
            with signals.defer_signals("", print, [signal.SIGINT], interrupts=True):
                line = input(prompt)
        except EOFError:
            notes.print()
            return
        except UnicodeDecodeError:
            notes.print("\nThat was not UTF-8; say it again.", "yellow")
            continue
        except KeyboardInterrupt:
            begun = ""
            notes.print("\n(/quit or Ctrl-D leaves)", "dim")
            continue
        if line.endswith("\\"):
            begun += line[:-1] + "\n"
        else:
            yield begun + line
            begun = ""


def _piped_lines() -> Iterator[str]:
    from engine.files import decode_utf8

    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode_utf8(line, f"Line {number} of the input").rstrip("\r\n")


@dataclasses.dataclass
class PrintedAnswer:
    """A completion as it was printed, and what it took."""

    text: str = ""
    tokens: int = 0
    # Why it ended; None if Ctrl-C did.
    finish_reason: str | None = None
    # Until the first token, and from it to the end.
    first_seconds: float = 0.0
    seconds: float = 0.0
    # Of its own tokens, and of those of its prompt that were computed.
    flop: int = 0


@dataclasses.dataclass
class ChatSession:
    """A model and the messages so far, as text: no KV cache is kept, and each turn prefills them all."""

    cfg: "ModelConfig"
    params: Any
    chat: "ChatTokenizer"
    eos_ids: Collection[int]  # tokens that end a completion, as do `chat.eot_ids`
    sampling: SamplingParams
    system: str = ""
    documents: "Documents | None" = None
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)  # of whole turns
    last_tokens: int = 0  # of the last turn, its prompt included
    _engine: "Engine | None" = None

    def execute(self, command: str) -> str:
        """Carries out `/clear` or `/system TEXT`, and returns what it did.

        Raises UserError for another command.
        """
        name, _, text = command.partition(" ")
        if name == "/clear":
            self.messages = []
            self.last_tokens = 0
            return "the conversation is forgotten"
        if name == "/system":
            self.system = text.strip()
            return f"system: {self.system or 'what the template says, if anything'}"
        raise UserError(
            f"There is no command {name}; there are /clear, /system TEXT and /quit. Begin a message with //."
        )

    def prompt(self, message: str) -> "tuple[list[int], list[Passage]]":
        """Returns the tokens of the conversation up to a message, and the passages of documents in
        it.

        Raises UserError when no room is left to answer.
        """
        from engine.text.documents import prompt_with

        def tokenize(turns: Sequence[Any]) -> list[int]:
            return self.chat.prompt(turns).tolist()

        context = self.cfg.context
        system = []
        if self.system:
            system.append({"role": "system", "content": self.system})
        question = {"role": "user", "content": message}
        turns = [*system, *self.messages, question]
        prompt, passages = prompt_with(self.documents, turns, self.chat.tokenizer, context, tokenize)
        if len(prompt) < context:
            return prompt, passages
        holds = f"tokens and the model's context holds {context:,}"
        alone = len(tokenize([*system, question]))
        if alone >= context:
            raise UserError(f"This message alone makes {alone:,} {holds}; say it in fewer words.")
        raise UserError(f"The conversation has {len(prompt):,} {holds}: /clear begins a new one.")

    def reply(self, message: str, notes: Console, chatty: bool = False) -> None:
        """Prints the completion as it comes, and on `notes` why it ended early, or its cost; adds
        the turn.

        A first Ctrl-C ends the completion, a second one the command. Raises UserError as `prompt`,
        before anything is printed.
        """
        prompt, passages = self.prompt(message)
        signals.set_phase("while an answer was written.")
        answer = self._print_answer(prompt)
        signals.set_phase("between two turns.")
        print(flush=True)
        reply = answer.text.rstrip()
        if not reply:
            notes.print("(no answer)", "dim")
            return
        self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]
        if passages:
            size = sum(passage.tokens for passage in passages)
            places = join_words([f"{passage.file} ({passage.number})" for passage in passages])
            cost = duration(answer.first_seconds * size / len(prompt))
            read = f"{size:,} of the {len(prompt):,} tokens read, about {cost}"
            notes.print(f"[from documents: {places}; {read}]", "dim")
        elif self.documents:
            notes.print(
                "[nothing of the documents fits this question, or the room that is left in the context]",
                "dim",
            )
        if chatty:
            notes.print(f"[{self._cost(len(prompt), answer)}]", "dim")
        self.last_tokens = len(prompt) + answer.tokens
        if answer.finish_reason is None:
            notes.print("[stopped]", "dim")
        if answer.finish_reason == "length":
            why = f"--max-tokens is {self.sampling.max_tokens:,}"
            if self.last_tokens >= self.cfg.context:
                why = "the context is full"
            notes.print(f"[cut off: {why}]", "yellow")

    def _print_answer(self, prompt: list[int]) -> "PrintedAnswer":
        """Prints the completion of a prompt as it comes, until Ctrl-C."""
        from engine.text.detokenizer import CompletionText

        completion = CompletionText(self.chat.tokenizer.stream())
        sampling = dataclasses.replace(self.sampling, stop_token_ids={*self.eos_ids, *self.chat.eot_ids})
        answer = PrintedAnswer()
        begin = time.perf_counter()
        first = begin
        ended_by_token = False
        with signals.defer_signals("", print, [signal.SIGINT]) as deferral:
            for events in self._generate(prompt, sampling):
                for event in events:
                    if first == begin:
                        first = time.perf_counter()
                    answer.finish_reason = event.finish_reason
                    ended_by_token = event.stop_token is not None
                    text = completion.push(event.tokens, last=event.finish_reason is not None)
                    if not answer.text:
                        text = text.lstrip()  # a space follows the name that ends a plain template
                    answer.text += text
                    print(text, end="", flush=True)
                if deferral.received:
                    break
        answer.tokens = completion.tokens
        answer.first_seconds = first - begin
        answer.seconds = time.perf_counter() - first
        assert self._engine
        flops = self._engine.meter.flops
        last = len(prompt) - 1
        decoded = answer.tokens + ended_by_token
        answer.flop = flops.prefilled(0, last) + flops.decoded(last, last + decoded)
        return answer

    def _cost(self, prompt_tokens: int, answer: "PrintedAnswer") -> str:
        """Returns what a turn has taken, where `last_tokens` is still of the turn before."""
        again = ""
        if self.last_tokens:
            again = f", {min(self.last_tokens, prompt_tokens):,} of them again"
        speed = ""
        if answer.tokens > 1 and answer.seconds > 0:
            speed = f", {(answer.tokens - 1) / answer.seconds:,.0f} tokens/s"
        read = f"turn {len(self.messages) // 2}: {prompt_tokens:,} tokens read{again}"
        wrote = f"{answer.tokens:,} written, the first after {duration(answer.first_seconds)}{speed}"
        from engine.counting.request_flops import training_step_flops

        steps = answer.flop / training_step_flops(self.cfg)
        return f"{read}; {wrote}; {si(answer.flop, 'FLOP')}, {in_words(steps)} of a training step"

    def warm(self) -> None:
        # the system message fills the context: each turn says so
        with contextlib.suppress(UserError):
            for _ in self._generate(self.prompt("a")[0], SamplingParams(max_tokens=2)):
                pass

    def _generate(self, prompt: list[int], sampling: SamplingParams) -> Iterator[list[Event]]:
        """Yields the events of each step."""
        from engine.inference.config import CHUNK, EngineConfig
        from engine.inference.engine import Engine
        from engine.inference.scheduler import DRAFT_ROWS

        sampling = sampling.within(self.cfg.context - len(prompt))
        tokens = max(len(prompt) + sampling.max_tokens, MIN_CAPACITY)
        capacity = min(1 << (tokens - 1).bit_length(), self.cfg.context)
        if self._engine is None or self._engine.capacity != capacity:
            # One program, which `warm` has compiled, reads prompts of any length.
            config = EngineConfig(1 + DRAFT_ROWS, capacity, kv_dtype=self.cfg.dtype, tail=CHUNK)
            self._engine = Engine(self.cfg, self.params, config)
        id = self._engine.submit(Request(tuple(prompt), sampling))
        try:
            while self._engine.busy:
                yield self._engine.step()
        finally:
            self._engine.cancel(id)


main = functools.partial(run_command, "chat", __doc__, ChatFlags, chat, one_arena=False)


if __name__ == "__main__":
    leave(main())

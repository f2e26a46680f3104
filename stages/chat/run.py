"""Runs a chat: loads the model, then replies to lines, or carries out their commands, until they end."""

import contextlib
import dataclasses
import datetime
import signal
import sys
from collections.abc import Iterator

from engine.device import Device
from engine.distributed import MISTAKE
from engine.errors import UserError, did_you_mean
from engine.format import duration, join_words
from engine.inference.decode import prepare_params
from engine.inference.request import SamplingParams
from engine.storage.digest import digest
from engine.storage.model_loader import load_model, with_adapters
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.jsonl import decode_utf8
from engine.text.template import read_template
from stages.chat.flags import DEFAULT_SAMPLING, ChatFlags
from stages.chat.session import SETTINGS, ChatSession, Turn, with_setting
from stages.cli import signals
from stages.cli.console import Console
from stages.cli.sampling import choose_sampling

COMMANDS = {
    "/help": "this list",
    "/stats": "tokens read and written so far, and whether the weights are as they were",
    "/clear": "forget the whole conversation",
    "/forget N": "forget the oldest N turns",
    "/system TEXT": "tell the model how to answer from now on (`/system` shows it, `/system -` takes it away)",
    "/set NAME VALUE": f"{', '.join(SETTINGS[:-1])} or {SETTINGS[-1]} (`/set` shows them)",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


def run(flags: ChatFlags, device: Device) -> int:
    """Chats until the input ends. Returns exit code 0, or 2 when a turn from a pipe failed."""
    notes, terminal = Console(sys.stderr), sys.stdin.isatty()
    chatty = terminal or flags.verbose
    template = read_template(flags.template)
    with notes.task(f"loading {flags.model or 'the newest finished run'}") as report:
        model = load_model(flags.model, report=report)
    notes.print_notes(model.notes)
    params, adapter_notes = with_adapters(model.cfg, model.params, flags.adapter)
    notes.print_notes(adapter_notes)
    params = prepare_params(model.cfg, params)
    chat = ChatTokenizer(model.tokenizer, template, now=datetime.datetime.now().isoformat(timespec="seconds"))
    fields, source = choose_sampling(model.sampling, flags.sampling.overrides, DEFAULT_SAMPLING, notes)
    sampling = SamplingParams(flags.sampling.max_tokens, seed=flags.sampling.seed, **fields)
    conversation = ChatSession(model.cfg, params, chat, model.eos_ids, sampling, flags.system or "")
    before = digest(params)
    if chatty:
        adapters = f" with {join_words([*map(str, flags.adapter)])}" if flags.adapter else ""
        notes.print_rows([
            ("model", f"{model}{adapters}"),
            ("device", str(device)),
            ("template", chat.template_name),
            ("sampling", source),
            ("weights", f"SHA-256 {before[:16]}, context {model.cfg.context:,} tokens"),
        ])  # fmt: skip
    with notes.task("compiling", always=terminal):
        conversation.warm()
    if terminal:
        notes.print("Type to talk; /help lists what else there is. The model sees this conversation and nothing else.\n", "dim")
    repl = Repl(conversation, notes, before, chatty, echo=not terminal)
    try:
        for line in _typed_lines(notes) if terminal else _piped_lines():
            if not repl.handle(line) and not terminal:
                return MISTAKE
            if repl.is_over:
                break
    finally:
        chat.close()
    if chatty:
        repl.print_stats()
    return 0


def _typed_lines(notes: Console) -> Iterator[str]:
    """Yields lines from a person. Ctrl-C drops a line, Ctrl-D ends; after a backslash a line goes on in the next."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() editing and history
    begun = ""
    while True:
        try:
            with signals.handle_signals():
                line = input("... " if begun else "> ")
        except EOFError:
            notes.print()
            return
        except UnicodeDecodeError:
            notes.print("\nThat was not UTF-8; say it again.", "yellow")
            continue
        except signals.Stopped as stopped:
            if stopped.number != signal.SIGINT:
                raise
            begun = ""
            notes.print("\n(/quit or Ctrl-D leaves)", "dim")
            continue
        if line.endswith("\\"):
            begun += line[:-1] + "\n"
        else:
            yield begun + line
            begun = ""


def _piped_lines() -> Iterator[str]:
    """Yields lines from a pipe or a file. Raises UserError for one that is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode_utf8(line, f"Line {number} of the input").rstrip("\r\n")


@dataclasses.dataclass
class Repl:
    """Replies to lines and carries out commands."""

    conversation: ChatSession
    notes: Console
    digest: str  # of the params at the start
    chatty: bool  # prints what each turn cost
    echo: bool = False  # prints the questions, which nobody typed on this screen
    is_over: bool = False

    def handle(self, line: str) -> bool:
        """Handles a turn or a command (`//` begins a turn with a slash). Returns False after printing why it failed."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.execute(*line[1:].split(maxsplit=1))
            elif line.strip():
                self.reply(line.removeprefix("/"))
        except UserError as error:
            self.notes.print(f"error: {error}", "red")
            return False
        return True

    def reply(self, message: str) -> None:
        """Prints the completion as it comes. A first Ctrl-C ends it, a second one the command."""
        turns = self.conversation.turns
        before = len(turns)
        if self.echo:
            print(f"> {message}", flush=True)
        with signals.handle_signals():
            signals.set_phase("while an answer was written.")
            with signals.defer_signals("", lambda _: None) as state:
                for text in self.conversation.reply(message, is_stopped=lambda: state.received is not None):
                    print(text, end="", flush=True)
        print("\n" * self.echo, flush=True)
        if state.received is not None and state.received != signal.SIGINT:
            raise signals.Stopped(state.received)
        if len(turns) == before:
            self.notes.print("(no answer)", "dim")
        else:
            self._print_turn(turns[-1])

    def _print_turn(self, turn: Turn) -> None:
        turns = self.conversation.turns
        prompt, completion = turn.prompt_tokens, turn.completion_tokens
        if self.chatty:
            known = sum(earlier.prompt_tokens + earlier.completion_tokens for earlier in turns[-2:-1])
            again = f", {min(known, prompt):,} of them again" if known else ""
            rest = turn.seconds - turn.first_token_seconds
            speed = f", {(completion - 1) / rest:,.0f} tokens/s" if completion > 1 and rest > 0 else ""
            first = f"the first after {duration(turn.first_token_seconds)}{speed}"
            self.notes.print(f"[turn {len(turns)}: {prompt:,} tokens read{again}; {completion:,} written, {first}]", "dim")
        if turn.finish_reason == "interrupted":
            self.notes.print("[stopped]", "dim")
        if turn.finish_reason == "length":
            full = prompt + completion >= self.conversation.cfg.context
            reason = "the context is full" if full else f"max_tokens is {self.conversation.sampling.max_tokens:,}"
            self.notes.print(f"[cut off: {reason}]", "yellow")

    def execute(self, name: str = "", rest: str = "") -> None:
        """Carries out a command, given without its slash. Raises UserError."""
        conversation, turns = self.conversation, self.conversation.turns
        if name in ("quit", "exit"):
            self.is_over = True
        elif name == "help":
            self.notes.print_rows([*COMMANDS.items()])
        elif name == "stats":
            self.print_stats()
        elif name == "clear":
            turns.clear()
            self.notes.print("[the conversation is forgotten]", "dim")
        elif name == "forget":
            if not rest.isdecimal() or not 1 <= int(rest) <= len(turns):
                raise UserError(f"/forget takes a number of turns, from 1 to the {len(turns)} there are.")
            del turns[: int(rest)]
            self.notes.print(f"[{len(turns)} turns are left]", "dim")
        elif name == "system":
            conversation.system = "" if rest == "-" else rest or conversation.system
            self.notes.print(f"[system: {conversation.system or 'what the template says, if anything'}]", "dim")
        elif name == "set":
            if words := rest.replace("=", " ").split():
                if len(words) != 2:
                    raise UserError("/set takes a name and a value, such as /set temperature 0.2.")
                conversation.sampling = with_setting(conversation.sampling, *words)
            self.notes.print_rows([(name, str(getattr(conversation.sampling, name))) for name in SETTINGS])
        else:
            known = [command.split()[0][1:] for command in COMMANDS]
            raise UserError(f"There is no command /{name}; /help lists them.{did_you_mean(name, known)}")

    def print_stats(self) -> None:
        """Prints the counts of turns and of tokens read and written, and whether the weights are unchanged."""
        turns = self.conversation.turns
        now = digest(self.conversation.params)
        same = "unchanged" if now == self.digest else f"CHANGED from {self.digest[:16]}"
        read = sum(turn.prompt_tokens for turn in turns)
        new = turns[-1].prompt_tokens if turns else 0
        self.notes.print_rows([
            ("turns", f"{len(turns):,}"),
            ("read", f"{read:,} tokens, {read - new:,} of them not for the first time; the last turn's prompt had {new:,}"),
            ("written", f"{sum(turn.completion_tokens for turn in turns):,} tokens"),
            ("weights", f"{same}: SHA-256 {now[:16]}"),
            ("kept", "this text; the model keeps nothing between turns"),
        ])  # fmt: skip

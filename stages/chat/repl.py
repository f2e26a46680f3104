r"""Talk with a model in the terminal, turn by turn.

    python -m stages.chat --model smollm2-135m-instruct
    python -m stages.chat --model smollm2-135m-instruct --adapter runs/smollm2-135m-instruct-voice --system "Answer briefly."
    printf 'Hello\nWhat is a tide?\n' | python -m stages.chat --model smollm2-135m-instruct

A model keeps nothing between turns: each time it reads the whole conversation again, and /stats shows what that costs.
Without a terminal, every line that comes in is a turn. Answers go to standard output, everything else to standard error.
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from engine.inference.sampling_params import RANGES, SamplingParams
from stages.cli import signals
from stages.cli.command import MISTAKE, run_command
from stages.cli.flags import DeviceFlag, ModelFlag, VerboseFlag, default, in_range, parser, path

if TYPE_CHECKING:
    from stages.cli.console import Console
    from stages.session import Session, Turn

COMMANDS = {
    "/help": "this list",
    "/stats": "tokens read and written so far, and whether the weights are as they were",
    "/clear": "forget the whole conversation",
    "/forget N": "forget the oldest N turns",
    "/system TEXT": "tell the model how to answer from now on (`/system` shows it, `/system -` takes it away)",
    "/set NAME VALUE": "temperature, top_k, top_p, min_p, max_tokens or seed (`/set` shows them)",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


@dataclasses.dataclass(frozen=True)
class Talk:
    """A model, how it is to answer, and how tokens are drawn."""

    model: ModelFlag = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or a named model."""
    adapter: Annotated[tuple[Path, ...], default("none")] = ()
    """What fine-tunings with --lora learnt about this model; several add up."""
    system: Annotated[str | None, parser(str, "TEXT"), default("what the template says")] = None
    """How the model is to answer."""
    template: Annotated[Path | None, parser(path, "FILE"), default("the model's own")] = None
    """A chat template (Jinja) to use in place of the model's."""
    max_tokens: Annotated[int, parser(in_range(RANGES["max_tokens"]), "N")] = 400
    """Tokens of an answer at most."""
    temperature: Annotated[float, parser(in_range(RANGES["temperature"]), "X")] = 0.7
    """0 takes the most probable token each time; higher is more varied."""
    top_k: Annotated[int, parser(in_range(RANGES["top_k"]), "N"), default("0, all")] = 0
    """Draw from the N most probable tokens."""
    top_p: Annotated[float, parser(in_range(RANGES["top_p"]), "X")] = 0.9
    """Draw from the fewest tokens that together have this probability."""
    min_p: Annotated[float, parser(in_range(RANGES["min_p"]), "X"), default("0, all")] = 0.0
    """Draw from tokens at least this share as probable as the best."""
    seed: Annotated[int, parser(in_range(RANGES["seed"]), "N")] = 0
    """The same seed and the same conversation draw the same answers."""
    device: DeviceFlag = "auto"
    """auto, cpu, gpu or tpu."""
    verbose: VerboseFlag = False
    """Say more on stderr: the cost of each turn, the digest of the weights, the traceback of an error."""


def talk(given: Talk) -> int:
    """Answers until the input ends. 0, or 2 when a turn that was piped in did not fit."""
    from engine.device import start_jax

    signals.set_phase("before a turn was begun.")
    started = start_jax(given.device, decodes=True)
    from engine.storage.digest import digest
    from stages.cli.console import Console

    notes = Console(sys.stderr)
    session, described = _begin(given, notes)
    terminal = sys.stdin.isatty()
    before = digest(session.params)
    if terminal or given.verbose:
        rows = [("model", described), ("device", str(started)), ("template", session.chat.named)]
        notes.print_rows([*rows, ("weights", f"SHA-256 {before[:16]}, context {session.cfg.context:,} tokens")])
    with notes.task("compiling", always=terminal):
        session.warm()
    if terminal:
        notes.print("Type to talk; /help lists what else there is. The model sees this conversation and nothing else.\n", "dim")
    talker = Talker(session, notes, before, chatty=terminal or given.verbose)
    try:
        for line in _typed(notes) if terminal else _piped():
            if not talker.take(line) and not terminal:
                return MISTAKE
            if talker.over:
                break
    finally:
        session.chat.close()
    if terminal or given.verbose:
        talker.stats()
    return 0


def _begin(given: Talk, notes: "Console") -> "tuple[Session, str]":
    """The session as the flags describe it, and the model in words."""
    import datetime

    from engine import format as words
    from engine.inference import decode
    from engine.storage.find import load_model, with_adapters
    from engine.text.chat import Chat
    from engine.text.template import read_template
    from stages.session import SETTINGS, Session

    source = read_template(given.template)
    with notes.task(f"loading {given.model or 'the newest run'}") as report:
        model = load_model(given.model, report=report)
    notes.warn_damaged(model.damaged, model.checkpoint)
    described = f"{model.name} ({model.checkpoint})"
    params = with_adapters(model.params, given.adapter)
    if given.adapter:
        described += f" with {words.listed([*map(str, given.adapter)])}"
    chat = Chat(model.tokenizer, source, now=datetime.datetime.now().isoformat(timespec="seconds"))
    sampling = SamplingParams(**{name: getattr(given, name) for name in SETTINGS})
    params = decode.for_inference(model.cfg, params)
    return Session(model.cfg, params, chat, model.ends, sampling, given.system or ""), described


class Talker:
    """Takes lines in, prints answers, and carries out what begins with a slash."""

    def __init__(self, session: "Session", notes: "Console", weights: str, chatty: bool) -> None:
        self.session, self.notes, self.weights, self.chatty = session, notes, weights, chatty
        self.over = False

    def take(self, line: str) -> bool:
        """One line: a turn, or a command. False when it could not be done, which was said."""
        from engine.errors import UserError

        try:
            if line.startswith("/") and not line.startswith("//"):
                self.command(*line[1:].split(maxsplit=1))
            elif line.strip():
                self.answer(line[1:] if line.startswith("//") else line)
        except UserError as error:
            self.notes.print(f"error: {error}", "red")
            return False
        return True

    def answer(self, asked: str) -> None:
        """Prints the answer as it comes. A first Ctrl-C ends it where it is, a second one the command."""
        with signals.handle_signals():
            signals.set_phase("while an answer was written.")
            with signals.deferred("", lambda _: None) as watch:
                before = len(self.session.turns)
                for text in self.session.say(asked, stopped=lambda: watch.received is not None):
                    print(text, end="", flush=True)
        print(flush=True)
        turn = self.session.turns[-1] if len(self.session.turns) > before else None
        if watch.received is not None and watch.received != signal.SIGINT:
            raise signals.Stopped(watch.received)
        if turn is None:
            self.notes.print("(no answer)", "dim")
        else:
            self.note(turn)

    def note(self, turn: "Turn") -> None:
        """What a turn cost, and why its answer ended if that was not by itself."""
        from engine.format import duration

        if self.chatty:
            number = len(self.session.turns)
            known = sum(earlier.read + earlier.wrote for earlier in self.session.turns[-2:-1])
            again = f", {min(known, turn.read):,} of them again" if known else ""
            rest = turn.seconds - turn.first
            speed = f", {(turn.wrote - 1) / rest:,.0f} tokens/s" if turn.wrote > 1 and rest > 0 else ""
            self.notes.print(
                f"[turn {number}: {turn.read:,} tokens read{again}; {turn.wrote:,} written, the first after "
                f"{duration(turn.first)}{speed}]",
                "dim",
            )
        if turn.ended == "interrupted":
            self.notes.print("[stopped]", "dim")
        if turn.ended == "length":
            full = turn.read + turn.wrote >= self.session.cfg.context
            reason = "the context is full" if full else f"max_tokens is {self.session.sampling.max_tokens:,}"
            self.notes.print(f"[cut off: {reason}]", "yellow")

    def command(self, name: str = "", rest: str = "") -> None:
        """Carries out what stands after a slash. Raises UserError when there is no such command."""
        from engine.errors import UserError, nearest
        from stages.session import SETTINGS, with_setting

        session = self.session
        if name in ("quit", "exit"):
            self.over = True
        elif name == "help":
            self.notes.print_rows([*COMMANDS.items()])
        elif name == "stats":
            self.stats()
        elif name == "clear":
            session.turns.clear()
            self.notes.print("[the conversation is forgotten]", "dim")
        elif name == "forget":
            if not rest.isdecimal() or not 1 <= int(rest) <= len(session.turns):
                raise UserError(f"/forget takes a number of turns, from 1 to the {len(session.turns)} there are.")
            del session.turns[: int(rest)]
            self.notes.print(f"[{len(session.turns)} turns are left]", "dim")
        elif name == "system":
            session.system = "" if rest == "-" else rest or session.system
            self.notes.print(f"[system: {session.system or 'what the template says, if anything'}]", "dim")
        elif name == "set":
            if rest:
                session.sampling = with_setting(session.sampling, *_two(rest))
            self.notes.print_rows([(name, str(getattr(session.sampling, name))) for name in SETTINGS])
        else:
            known = [command.split()[0][1:] for command in COMMANDS]
            raise UserError(f"There is no command /{name}; /help lists them.{nearest(name, known)}")

    def stats(self) -> None:
        """What the conversation has cost, and whether the weights are as they were."""
        from engine.storage.digest import digest

        turns = self.session.turns
        now = digest(self.session.params)
        same = "unchanged" if now == self.weights else f"CHANGED from {self.weights[:16]}"
        read = sum(turn.read for turn in turns)
        new = turns[-1].read if turns else 0
        self.notes.print_rows([
            ("turns", f"{len(turns):,}"),
            ("read", f"{read:,} tokens, {read - new:,} of them not for the first time; the last turn's prompt had {new:,}"),
            ("written", f"{sum(turn.wrote for turn in turns):,} tokens"),
            ("weights", f"{same}: SHA-256 {now[:16]}"),
            ("kept", "this text; the model keeps nothing between turns"),
        ])  # fmt: skip


def _two(rest: str) -> tuple[str, str]:
    from engine.errors import UserError

    words = rest.replace("=", " ").split()
    if len(words) != 2:
        raise UserError("/set takes a name and a value, such as /set temperature 0.2.")
    return words[0], words[1]


def _typed(notes: "Console") -> Iterator[str]:
    """Lines from a person. Ctrl-C forgets the line, Ctrl-D ends; a line that ends with a backslash goes on in the next."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its editing and its memory of lines
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
            continue
        yield begun + line
        begun = ""


def _piped() -> Iterator[str]:
    """Lines from a pipe or a file."""
    from engine.errors import UserError

    for count, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"Line {count} of the input is not UTF-8: byte 0x{line[error.start]:02X}.") from None


def main(args: Sequence[str] | None = None) -> int:
    return run_command("chat", __doc__, Talk, talk, args)


if __name__ == "__main__":
    sys.exit(main())

"""One chat: loads the model, then answers lines until they end."""

import contextlib
import datetime
import signal
import sys
from collections.abc import Iterator

from engine.device import Device
from engine.errors import UserError
from engine.format import listed
from engine.inference.decode import for_inference
from engine.storage.digest import digest
from engine.storage.find import load_model, with_adapters
from engine.text.chat import Chat
from engine.text.template import read_template
from stages.chat import flags
from stages.chat.conversation import Conversation
from stages.chat.repl import Repl
from stages.cli import signals
from stages.cli.command import MISTAKE
from stages.cli.console import Console


def run(flags: flags.Chat, device: Device) -> int:
    """Answers until the input ends. 0, or 2 when a turn that was piped in did not fit."""
    notes, terminal = Console(sys.stderr), sys.stdin.isatty()
    template = read_template(flags.template)
    with notes.task(f"loading {flags.model or 'the newest run'}") as report:
        model = load_model(flags.model, report=report)
    notes.warn_damaged(model.damaged, model.checkpoint)
    params = for_inference(model.cfg, with_adapters(model.cfg, model.params, flags.adapter))
    chat = Chat(model.tokenizer, template, now=datetime.datetime.now().isoformat(timespec="seconds"))
    conversation = Conversation(model.cfg, params, chat, model.ends, flags.sampling.params(), flags.system or "")
    before = digest(params)
    if terminal or flags.verbose:
        adapters = f" with {listed([*map(str, flags.adapter)])}" if flags.adapter else ""
        notes.print_rows([
            ("model", f"{model.name} ({model.checkpoint}){adapters}"),
            ("device", str(device)),
            ("template", chat.template_name),
            ("weights", f"SHA-256 {before[:16]}, context {model.cfg.context:,} tokens"),
        ])  # fmt: skip
    with notes.task("compiling", always=terminal):
        conversation.warm()
    if terminal:
        notes.print("Type to talk; /help lists what else there is. The model sees this conversation and nothing else.\n", "dim")
    repl = Repl(conversation, notes, before, chatty=terminal or flags.verbose)
    try:
        for line in typed_lines(notes) if terminal else piped_lines():
            if not repl.handle(line) and not terminal:
                return MISTAKE
            if repl.is_over:
                break
    finally:
        chat.close()
    if terminal or flags.verbose:
        repl.print_stats()
    return 0


def typed_lines(notes: Console) -> Iterator[str]:
    """Yields lines from a person. Ctrl-C drops the line, Ctrl-D ends; a line that ends with a backslash goes on in the next."""
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


def piped_lines() -> Iterator[str]:
    """Yields lines from a pipe or a file. Raises UserError, naming the line, for one that is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"Line {number} of the input is not UTF-8: byte 0x{line[error.start]:02X}.") from None

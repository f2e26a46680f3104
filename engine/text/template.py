"""Chat templates: messages in, text out, by a program that came with the model and is not trusted."""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError

WORKER = Path(__file__).with_name("template_worker.py")
START = 60.0  # seconds for a process to start and import, on a busy machine
ANSWER = 5.0  # seconds of waiting; 0.7 of computing are allowed, which the kernel counts (see `template_worker.py`)
TOGETHER = 32  # renderings asked for in one go
LONGEST = 8_000_000  # bytes of reply a rendering can have at most, everything escaped

# Templates may print the date. The same data are to make the same tokens tomorrow, so it is a fixed one unless given.
FIXED_DAY = "2026-01-01T00:00:00"

Message = Mapping[str, str]  # role: system, user, assistant or tool; content: text


def read_template(path: Path | None) -> str | None:
    """Returns the chat template in a file; None for no file. Raises UserError when it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"The template {path} cannot be read: {reason}.") from error


class Refusal(UserError):
    """A conversation that cannot be used, for example as the template does not take it (`raise_exception`); others may."""


class Template:
    """A compiled chat template (Jinja), run in a sandbox in a process of its own that may compute for 0.7 seconds,
    write 1 MB and use 512 MB, and may not open, import or start anything.

    `variables` are the names it can use besides `messages` and `add_generation_prompt`: bos_token, eos_token, ... `now` is
    the moment, in ISO format, that `strftime_now` tells. The process starts with the first rendering and ends with
    `close`, or when nothing refers to the template any more.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, now: str = FIXED_DAY) -> None:
        self.source = source
        self._start = {"source": source, "variables": dict(variables or {}), "now": now}
        self._process: TemplateProcess | None = None
        self._lock = threading.Lock()

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Returns the text of a conversation; with `prompt`, the beginning of the assistant's next turn after it.

        Raises Refusal when the template refuses the messages, UserError when it cannot be compiled, fails, or goes over
        its limits of time, memory and output.
        """
        return self.render_all([(messages, prompt)])[0]

    def render_all(self, jobs: Sequence[tuple[Sequence[Message], bool]]) -> list[str]:
        """Renders several conversations, as `render` each; quicker, as most of the time of one is the way there and back."""
        texts: list[str] = []
        with self._lock:
            for first in range(0, len(jobs), TOGETHER):
                part = jobs[first : first + TOGETHER]
                texts += self._ask([([*map(dict, messages)], prompt) for messages, prompt in part])["texts"]
        return texts

    def close(self) -> None:
        """Ends the process; a later rendering starts another."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _ask(self, request: Any) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start_process()
        try:
            self._process.send(request)
            reply = self._process.reply(ANSWER, LONGEST * TOGETHER)
        except BaseException:
            self.close()  # whatever it still answers would be taken for the next answer
            raise
        return _check_reply(reply)

    def _start_process(self) -> "TemplateProcess":
        process = TemplateProcess()
        weakref.finalize(self, process.end)
        try:
            process.send(self._start | {"path": [entry for entry in sys.path if entry]})
            process.reply(START, 1000)
            _check_reply(process.reply(ANSWER, 10_000))
        except BaseException:
            process.end()
            raise
        return process


class TemplateProcess:
    """The process of a template, and the two pipes to it."""

    def __init__(self) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # -I -S: nothing of the user's environment or start-up files runs there. Its own session: Ctrl-C is not for it.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(WORKER)], stdin=theirs_in, stdout=theirs_out,
            stderr=subprocess.DEVNULL, start_new_session=True, env={},
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.requests, self.replies = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb", buffering=0)
        self.unread = bytearray()

    def send(self, request: Any) -> None:
        """Writes one line to the process. That it is gone shows when it does not reply."""
        with contextlib.suppress(BrokenPipeError):
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()

    def reply(self, seconds: float, longest: int) -> dict[str, Any]:
        """Returns its next line, at most `longest` bytes. The time runs anew with each part that arrives. Raises UserError."""
        poll = select.poll()
        poll.register(self.replies, select.POLLIN)
        while b"\n" not in self.unread:
            part = os.read(self.replies.fileno(), 1 << 20) if poll.poll(1000 * seconds) else b""
            self.unread += part
            if not part or len(self.unread) > longest:
                raise UserError("The chat template ran for more than a second, or out of memory, and was stopped.")
        line, _, rest = self.unread.partition(b"\n")
        self.unread = bytearray(rest)
        return json.loads(line)

    def end(self) -> None:
        """Ends the process, whatever it does at the moment."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                pipe.close()


def _check_reply(reply: dict[str, Any]) -> dict[str, Any]:
    if "refused" in reply:
        raise Refusal(f"The chat template refuses it: {_printable(reply['refused'])}")
    if "failed" in reply:
        raise UserError(f"The chat template {_printable(reply['failed'])}")
    return reply


def _printable(message: str) -> str:
    """Returns a template's words, without what would steer a terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in message)
    return text.rstrip(".") + "."

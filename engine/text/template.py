"""Chat templates: messages in, text out, by a program that came with the model and is not trusted."""

import contextlib
import itertools
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
    try:
        return None if path is None else path.read_text(encoding="utf-8")
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
            for part in itertools.batched(jobs, TOGETHER):
                if self._process is None:
                    self._process = TemplateProcess(self._start)
                    weakref.finalize(self, self._process.end)
                try:
                    self._process.send([([*map(dict, messages)], prompt) for messages, prompt in part])
                    reply = self._process.reply(ANSWER, LONGEST * TOGETHER)
                except BaseException:
                    self.close()  # whatever it still answers would be taken for the next answer
                    raise
                texts += _check_reply(reply)["texts"]
        return texts

    def close(self) -> None:
        """Ends the process; a later rendering starts another."""
        if self._process is not None:
            self._process.end()
            self._process = None


class TemplateProcess:
    """The process of a template, and the two pipes to it. Raises UserError when the template cannot be compiled."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        # -I -S: nothing of the user's environment or start-up files runs there. Its own session: Ctrl-C is not for it.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True, env={},
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout.fileno()
        self.unread = bytearray()
        try:
            self.send({**start, "path": [entry for entry in sys.path if entry]})
            self.reply(START, 1000)
            _check_reply(self.reply(ANSWER, 10_000))
        except BaseException:
            self.end()
            raise

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
            part = os.read(self.replies, 1 << 20) if poll.poll(1000 * seconds) else b""
            self.unread += part
            if not part or len(self.unread) > longest:
                raise UserError("The chat template ran for more than a second, or out of memory, and was stopped.")
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process, whatever it does at the moment."""
        with contextlib.suppress(OSError), self.process:  # which closes the pipes and waits
            self.process.kill()


def _check_reply(reply: dict[str, Any]) -> dict[str, Any]:
    for kind, error, opening in (("refused", Refusal, "refuses it: "), ("failed", UserError, "")):
        if kind in reply:  # without what would steer a terminal
            words = "".join(letter if letter.isprintable() else " " for letter in reply[kind])
            raise error(f"The chat template {opening}{words.rstrip('.')}.")
    return reply

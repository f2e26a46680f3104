"""Renders messages as text by a chat template, an untrusted program that came with the model."""

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
from types import MappingProxyType
from typing import Any

from engine.errors import UserError
from engine.untrusted import read_text

WORKER = Path(__file__).with_name("template_worker.py")
START_SECONDS = 60.0  # for a process to start and import, on a busy machine
REPLY_SECONDS = 5.0  # waiting; `template_worker.py` limits the computing
BATCH = 32  # renderings in one request
MAX_REPLY_BYTES = 8_000_000  # a rendering's reply, everything escaped
READ_BYTES = 2**20  # at once
FIXED_DAY = "2026-01-01T00:00:00"  # that templates print: the same tokens every day

# role: system, user, assistant or tool; content: text; what else a template reads: tool_calls
Message = Mapping[str, Any]


def read_template(path: Path | None) -> str | None:
    if path:
        return read_text(path)
    return None


class InvalidConversation(UserError):
    """Raised for one conversation that cannot be used, for example as the template refuses it
    (`raise_exception`).
    """


class Template:
    """A chat template (Jinja), run in a sandbox in a process of its own, with the limits of
    `template_worker.py`.

    `variables` are its names besides `messages` and `add_generation_prompt`: bos_token, eos_token,
    ... `now` is the time of `strftime_now`, in ISO format. The process starts with the first
    rendering and ends with `close`, or when nothing refers to the template any more.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, now: str = FIXED_DAY) -> None:
        self._start = {"source": source, "variables": dict(variables or {}), "now": now}
        self.process: TemplateProcess | None = None
        self._lock = threading.Lock()

    def render(
        self, jobs: Sequence[tuple[Sequence[Message], bool]], more: Mapping[str, Any] = MappingProxyType({})
    ) -> list[str]:
        """Renders each (messages, prompt) as text; `prompt` adds the generation prompt, the start
        of the assistant's turn.

        `more`: variables of these jobs, such as tools. Several in one call are quicker: most of the
        time is the way there and back. Raises InvalidConversation when the template refuses the
        messages, UserError when it cannot be compiled, fails, or exceeds its limits of time, memory
        and output.
        """
        texts: list[str] = []
        with self._lock:
            for batch in itertools.batched(jobs, BATCH):
                requests = []
                for messages, prompt in batch:
                    requests.append(([dict(message) for message in messages], prompt))
                reply = self._ask([requests, dict(more)])
                texts += _check_reply(reply)["texts"]
        return texts

    def _ask(self, request: Any) -> dict[str, Any]:
        """Returns the process's reply to a request; starts the process where there is none."""
        if self.process is None:
            self.process = TemplateProcess(self._start)
            weakref.finalize(self, self.process.end)
        try:
            self.process.send(request)
            return self.process.reply(REPLY_SECONDS, MAX_REPLY_BYTES * BATCH)
        except BaseException:
            self.close()  # a late reply would be taken for the next one
            raise

    def close(self) -> None:
        if self.process:
            self.process.end()
            self.process = None


class TemplateProcess(subprocess.Popen[bytes]):
    """A template's process, and the two pipes to it. Raises UserError when the template cannot be
    compiled.
    """

    def __init__(self, start: Mapping[str, Any]) -> None:
        # -I -S: none of the user's environment or start-up files. Its own session: Ctrl-C is not
        # for it.
        pipe = subprocess.PIPE
        command = [sys.executable, "-I", "-S", "-B", str(WORKER)]
        super().__init__(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True, env={}
        )
        self.unread = bytearray()
        try:
            self.send({**start, "path": [entry for entry in sys.path if entry]})
            _check_reply(self.reply(START_SECONDS, 10_000))
        except BaseException:
            self.end()
            raise

    def send(self, request: Any) -> None:
        """Sends a request to the process; if it is gone, `reply` raises."""
        assert self.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(json.dumps(request).encode() + b"\n")
            self.stdin.flush()

    def reply(self, seconds: float, longest: int) -> dict[str, Any]:
        """Reads the next reply, at most `longest` bytes, waiting `seconds` for each part. Raises
        UserError.
        """
        assert self.stdout is not None
        poll = select.poll()
        poll.register(self.stdout, select.POLLIN)
        while b"\n" not in self.unread:
            part = b""
            if poll.poll(1000 * seconds):
                part = os.read(self.stdout.fileno(), READ_BYTES)
            self.unread += part
            if not part or len(self.unread) > longest:
                raise UserError(
                    "The chat template ran for more than a second, or out of memory, and was stopped."
                )
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        with contextlib.suppress(OSError), self:  # closes the pipes and waits
            self.kill()


def _check_reply(reply: dict[str, Any]) -> dict[str, Any]:
    """Returns a reply. Raises InvalidConversation or UserError for one that tells of a failure."""
    if "refused" in reply:
        raise InvalidConversation(f"The chat template refuses it: {_printable(reply['refused'])}.")
    if "failed" in reply:
        raise UserError(f"The chat template {_printable(reply['failed'])}.")
    return reply


def _printable(text: str) -> str:
    """Returns a sentence of a template without what would steer a terminal, and without its full stop."""
    letters = [letter if letter.isprintable() else " " for letter in text]
    return "".join(letters).rstrip(".")

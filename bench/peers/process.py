"""A peer: another interpreter that computes the same thing and is asked for one round at a time."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError

HERE = Path(__file__).resolve().parent
INSTALL = "pip install -e '.[peers]'"
ELSEWHERE = "python3 -m venv peers && peers/bin/pip install torch numpy transformers"

# Torch takes memory for each step and gives it back, as XLA does: it gets the allocator settings that ours has, which
# take a fifth off its training step.
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


class PeerError(RuntimeError):
    """A peer that is not there or could not do it; the message is its own."""


class Peer:
    """One of our peer scripts (see `protocol.serve`) in another process; a question at a time, each answered."""

    def __init__(self, python: Path, script: str):
        """Raises OSError when `python` cannot be run."""
        # What leads this Python to its modules would mislead that one.
        outside = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH", "PYTHONHOME"}}
        self.words = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, HERE / script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True,
            env=outside | KEEP_FREED | QUIET,
        )  # fmt: skip

    def read(self) -> dict[str, Any]:
        """Returns its next answer. Raises PeerError with what it says went wrong, or with its last words."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        try:
            reply = json.loads(line)
        except ValueError:
            self.process.kill()
            self.process.wait()
            self.words.seek(0)
            words = self.words.read().decode(errors="replace").strip() or line.strip() or "not a word"
            raise PeerError(f"it is gone; its last words: {words.splitlines()[-1][:300]}") from None
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def ask(self, **question: Any) -> dict[str, Any]:
        """Returns the answer to one question. Raises PeerError."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says more
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        return self.read()

    def prepare(self, job: str, spec: dict[str, Any], keep: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
        """Returns a call that has the job run once and hands the answer to `keep`; it has run once, hence is compiled.
        Raises PeerError when the peer cannot do it."""
        self.ask(make=job, spec=spec)
        run = lambda: keep(self.ask(run=job))
        run()
        return run

    @property
    def gone(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.words):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def started(
    python: Path | None, script: str, absent: list[dict[str, str]], needs: str = "torch", elsewhere: str = ELSEWHERE
) -> Iterator[Peer | None]:
    """Starts the peer of a script in `python` (None: this one); None, with an entry in `absent`, where its library is not.

    `elsewhere` makes an environment that has it. Raises UserError when a Python that was named cannot be run or has no
    `needs`.
    """
    try:
        peer = Peer(python or Path(sys.executable), script)
    except OSError as error:
        raise UserError(
            f"--peer-python {python} cannot be run ({error.strerror}); give the python of an environment that has {needs}."
        ) from None
    try:
        hello = peer.read()
    except PeerError as error:
        peer.close()
        raise UserError(f"{python or sys.executable} does not answer as a Python would: {error}") from None
    try:
        if missing := hello.get("missing"):
            if missing == needs and python:
                raise UserError(f"--peer-python {python} has no {needs} ({hello['why']}); make one that has: {elsewhere}")
            note_absent(absent, missing, hello["why"], f"{python} -m pip install {missing}" if python else INSTALL)
            yield None
        else:
            print("peer: " + ", ".join(f"{name} {version}" for name, version in hello["versions"].items()), flush=True)
            yield peer
    finally:
        peer.close()


def note_absent(absent: list[dict[str, str]], name: str, reason: str, install: str) -> None:
    """Notes and prints that a peer is not compared with, why, and what would bring it."""
    absent.append({"name": name, "reason": reason, "install": install})
    print(f"absent: {name} ({reason})\n        to have it: {install}", flush=True)

"""Runs a peer: another Python process that computes the same as we do, one round at a time."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import Json
from engine.errors import UserError

HERE = Path(__file__).resolve().parent
# -c: the packages that follow, in the file's versions
INSTALL = "pip install -c bench/peers/requirements.txt"

# Torch allocates and frees memory in each step, as XLA does: our allocator settings take a fifth
# off its training step.
KEEP_FREED_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
QUIET_ENV = {"PYTHONWARNINGS": "ignore"}


class PeerError(RuntimeError):
    """A peer that has ended or could not do a job; the message is its own."""


class Peer:
    """A peer script in another process, which answers one question at a time (see `protocol.serve_jobs`)."""

    def __init__(self, python: Path, script: str, preload: Path | None = None):
        """`preload`: a library that is loaded before all others. Raises OSError when `python` cannot be run."""
        # This Python's module paths would mislead the other one.
        outside = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH", "PYTHONHOME"}}
        preloaded = {"LD_PRELOAD": str(preload)} if preload else {}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, HERE / script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=outside | KEEP_FREED_ENV | QUIET_ENV | preloaded,
        )
        assert self.process.stdin
        assert self.process.stdout
        self._questions = self.process.stdin
        self._answers = self.process.stdout

    def read(self) -> Json:
        """Returns the next answer. Raises PeerError with the peer's error, or with its last words."""
        line = self._answers.readline()
        try:
            reply = json.loads(line)
        except ValueError:
            self.process.kill()
            self.process.wait()
            self.log.seek(0)
            words = self.log.read().decode(errors="replace").strip() or line.strip() or "not a word"
            raise PeerError(f"it is gone; its last words: {words.splitlines()[-1][:300]}") from None
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def ask(self, **question: Any) -> Json:
        """Returns the answer to one question. Raises PeerError."""
        with contextlib.suppress(BrokenPipeError):  # `read` says more
            self._questions.write(json.dumps(question) + "\n")
            self._questions.flush()
        return self.read()

    def close(self) -> None:
        """Terminates the process and closes its pipes."""
        self.process.terminate()
        self.process.wait()
        for stream in (self._questions, self._answers, self.log):
            with contextlib.suppress(OSError):
                stream.close()


@contextlib.contextmanager
def start_peer(
    python: Path | None,
    script: str,
    needs: str = "torch",
    packages: str = "torch numpy",
    preload: Path | None = None,
) -> Iterator[Peer | None]:
    """Starts a peer script in `python` (None: this one). Yields None, and says so, where its
    library is missing.

    `packages`: those of requirements.txt that the script imports. `preload`: a library that it
    loads before all others. Raises UserError when a given `python` cannot be run or lacks `needs`.
    """
    try:
        peer = Peer(python or Path(sys.executable), script, preload)
    except OSError as error:
        raise UserError(
            f"--peer-python {python} cannot be run ({error.strerror}); "
            f"give the python of an environment that has {needs}."
        ) from None
    with contextlib.closing(peer):
        try:
            hello = peer.read()
        except PeerError as error:
            raise UserError(
                f"{python or sys.executable} does not answer as a Python would: {error}"
            ) from None
        missing = hello.get("missing")
        if missing:
            refuse_or_report(missing, hello["why"], needs=needs, packages=packages, python=python)
            yield None
            return
        versions = [f"{name} {version}" for name, version in hello["versions"].items()]
        print(f"peer: {', '.join(versions)}", flush=True)
        yield peer


def refuse_or_report(missing: str, why: str, *, needs: str, packages: str, python: Path | None) -> None:
    """Says that a peer's library is missing and how to have it. Raises UserError where it is the one
    that a given `python` was chosen for.
    """
    make_venv = f"python3 -m venv peers && peers/bin/{INSTALL} {packages}"
    if python is None:
        remedy = f"{make_venv}, and --peer-python peers/bin/python"
    elif missing == needs:
        raise UserError(f"--peer-python {python} has no {needs} ({why}); make one that has: {make_venv}")
    else:
        remedy = f"{python} -m {INSTALL} {missing}"
    print_absent(missing, why, remedy)


def print_absent(name: str, reason: str, install: str) -> None:
    print(f"absent: {name} ({reason})\n        to have it: {install}", flush=True)

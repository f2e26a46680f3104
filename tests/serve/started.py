"""Starts the command as its own process."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx

ROOT = Path(__file__).resolve().parents[2]
# While the file of the variable HOLD is there, no step is taken beyond those that give requests
# their slots.
HOLDS = """
import os, sys, time, engine.inference.engine as s
step = s.Engine.step
def hold(self):
    is_held = self.running and not self.waiting and os.path.exists(os.environ.get("HOLD", ""))
    return (time.sleep(0.01), [])[1] if is_held else step(self)
s.Engine.step = hold
from stages.serve.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class Started:
    """A server in a process of its own, ready when the block begins, or once it has printed `begun`. `program`: for Python; by
    default it can be held."""

    def __init__(
        self,
        folder: Path,
        *flags: object,
        env: Any = None,
        key: str = "",
        program: Sequence[str] = ("-c", HOLDS),
        begun: str = "Ctrl-C",
    ) -> None:
        words = ["--model", folder, "--port", 0, "--slots", 2, *flags]
        self.process = subprocess.Popen(
            [sys.executable, *program, *map(str, words)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | (env or {}),
        )
        self.output = ""
        self.read_to(begun)
        address = self.url if "Ctrl-C" in self.output else ""
        self.client = httpx.Client(
            base_url=address, timeout=300, headers={"Authorization": f"Bearer {key}"} if key else {}
        )

    def read_to(self, words: str) -> None:
        while words not in self.output:
            line = self.process.stdout.readline()
            assert line, self.output
            self.output += line

    @property
    def url(self) -> str:
        return re.findall(r"page +(\S+)", self.output)[0]

    def ends(self):
        self.output += self.process.communicate(timeout=300)[0]
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()
        self.process.stdout.close()

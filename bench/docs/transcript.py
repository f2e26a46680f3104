"""Follows the README from a model to its server, and keeps what it prints: ten minutes.

    python -m bench.docs.transcript --out FOLDER

Its document, transcript.json, holds the lines of each command, by its name, and the server's answer
to the README's curl.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cli import ROOT, run_bench
from bench.docs.readmes import READMES, sh_commands

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
BODY = re.compile(r"-d '(.*)'")  # of a README's curl
PAGE = re.compile(r"page +(\S+)")  # in what the server prints
QUESTION = "Why do sailors sing?\n"  # to `chat`


def follow(folder: Path, model: str) -> dict[str, Any]:
    """Runs the README's commands that name the model, in a folder; returns what they printed, and
    the server's answer.
    """
    printed: dict[str, list[str]] = {}
    answer = None
    for words in sh_commands(READMES[0]):
        if not any(model in word for word in words):
            continue
        print("python", *words, file=sys.stderr)
        command = words[1]
        if command == "stages.serve":
            printed[command], answer = _ask_server(words, folder)
            continue
        typed = ""
        if command == "stages.chat":
            typed = QUESTION
        run = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=ENVIRONMENT,
            input=typed,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        printed[command] = run.stdout.splitlines()
    return {"printed": printed, "answer": answer}


def _ask_server(words: Sequence[str], folder: Path) -> tuple[list[str], Any]:
    """Starts the server, sends it the README's request, and ends it. Returns the lines that it printed
    until it was ready, and its answer.
    """
    lines = []
    address = ""
    server = subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    with server:
        assert server.stdout
        for line in server.stdout:
            lines.append(line.rstrip("\n"))
            page = PAGE.search(line)
            if page:
                address = page[1]
            if "Ctrl-C" in line:
                break
        body = BODY.search(READMES[0].read_text())
        assert body
        url = f"{address}/v1/chat/completions"
        curl = ["curl", "-s", url, "-H", "content-type: application/json", "-d", body[1]]
        reply = subprocess.run(curl, capture_output=True, check=True)
        server.send_signal(signal.SIGTERM)
    return lines, json.loads(reply.stdout)


@dataclasses.dataclass(frozen=True)
class TranscriptFlags:
    model: str = "smollm2-135m-instruct"
    """The model that the README's commands name."""


def write_transcript(flags: TranscriptFlags) -> dict[str, Any]:
    """Follows the commands in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return follow(Path(folder), flags.model)


if __name__ == "__main__":
    sys.exit(run_bench("bench.docs.transcript", __doc__, TranscriptFlags, write_transcript))

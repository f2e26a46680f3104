"""Follows the README from a model to its server, and keeps what it prints: `python tests/transcript.py FOLDER`, ten minutes.

Writes FOLDER/transcript.json: the lines of each command, by its name, and the server's answer to
the README's curl.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from readmes import READMES, ROOT, sh_commands

from bench.cli import circumstances
from bench.machine import Watch

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
BODY = re.compile(r"-d '(.*)'")  # of a README's curl


def follow(folder: Path, model: str = "smollm2-135m-instruct") -> dict[str, object]:
    """Runs the README's commands that name the model, in a folder; returns what they printed, and
    the server's answer.
    """
    printed: dict[str, list[str]] = {}
    answer = None
    for words in sh_commands(READMES[0]):
        if not any(model in word for word in words):
            continue
        print("python", *words, file=sys.stderr)
        with subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            if words[1] != "stages.serve":
                output, _ = process.communicate("Why do sailors sing?\n" if words[1] == "stages.chat" else "")
                printed[words[1]] = output.splitlines()
                continue
            output = ""
            while "Ctrl-C" not in output:
                output += (line := process.stdout.readline())
                assert line, output
            body = BODY.search(READMES[0].read_text())[1]
            address = f"{re.findall(r'page +(\S+)', output)[0]}/v1/chat/completions"
            curl = ["curl", "-s", address, "-H", "content-type: application/json", "-d", body]
            answer = json.loads(subprocess.run(curl, capture_output=True, check=True).stdout)
            process.send_signal(signal.SIGTERM)
            printed[words[1]] = output.splitlines()
    return {"printed": printed, "answer": answer}


if __name__ == "__main__":
    flags = dataclasses.make_dataclass("Flags", [])()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        document = circumstances(["tests/transcript.py"], flags) | follow(Path(folder))
    document["machine"] |= watch.finish()
    (Path(sys.argv[1]) / "transcript.json").write_text(json.dumps(document) + "\n")

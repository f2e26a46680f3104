"""Serves the jobs of a peer over standard input and output: one JSON object a line in, one out.

It and the `*_peer.py` beside it run in another Python, which has the peer's library and none of
ours.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[], dict[str, Any]]


def serve_jobs(
    needs: list[str], make: Callable[[dict[str, Any]], Run], describe_build: Callable[[], str]
) -> None:
    """Greets, then answers questions until standard input ends.

    The greeting is `{"versions": {module: version}}`, or `{"missing": module, "why": text}` and
    nothing more. Then `{"make": name, "spec": {...}}` prepares a job, `{"run": name}` runs it once
    and is answered with its seconds and result, `{"drop": name}` forgets it. `{"about":
    "build"}` is answered with the versions and how the library was built. An error is answered with
    `{"error": text}`.
    """
    # Libraries print to standard output; the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=answers, flush=True)

    versions = {}
    for name in needs:
        try:
            versions[name] = str(getattr(importlib.import_module(name), "__version__", "?"))
        except Exception as error:  # a broken library
            say({"missing": name, "why": _sentence(error)})
            return
    say({"versions": versions})
    jobs: dict[str, Run] = {}
    for line in sys.stdin:
        try:
            question = json.loads(line)
            reply: dict[str, Any] = {}
            if "make" in question:
                jobs[question["make"]] = make(question["spec"])
            elif "drop" in question:
                jobs.pop(question["drop"], None)
            elif "about" in question:
                reply = {"versions": versions, "build": describe_build()}
            else:
                run = jobs[question["run"]]
                begin = time.perf_counter()
                reply = run()
                reply["seconds"] = time.perf_counter() - begin
            say(reply)
        except Exception as error:
            say({"error": _sentence(error)})


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"

"""Calls a user's function in a process of its own: `python own_function.py FILE FUNCTION SECONDS`.

Reads rows {"prompt", "completion", "answer"} as JSON on stdin, of which the function gets what it
has parameters for. Writes {"values": [...]}, or {"error": sentence} with the line of the file, as
JSON on stdout.
"""

import inspect
import json
import math
import os
import resource
import runpy
import signal
import sys
import traceback

LARGEST = 1e9  # of a value: the squares of such values are finite in float32
MESSAGE_CHARACTERS = 300  # of an error's own text
VALUE_CHARACTERS = 80  # of a value, completion or prompt in a sentence


def main(file: str, name: str, seconds: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints
    # For a function that never returns, if nobody is left to end it.
    cpu_seconds = math.ceil(float(seconds)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    try:
        reply = call(file, name, json.load(sys.stdin))
    except BaseException as error:
        reply = {"error": _describe(file, error)}
    json.dump(reply, answers)
    answers.flush()
    # `rewards.py` starts it in a group of its own; in another's this would end that other too.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # this process, and those that the function has started
    os._exit(0)  # whatever threads the file has started


def call(file: str, name: str, rows: list[dict[str, object]]) -> dict[str, object]:
    """Returns the function's value for each row, an error for NaN, no number or one beyond LARGEST;
    raises what it raises."""
    function = runpy.run_path(file).get(name)
    if not callable(function):
        return {"error": f"{file} has no function {name}."}
    parameters = inspect.signature(function).parameters
    values = []
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for row in rows:
        arguments = {key: value for key, value in row.items() if takes_all or key in parameters}
        value = function(**arguments)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST:  # NaN too
            wanted = f"{_shortened(value)}, where a number from -1e9 to 1e9 is wanted"
            case = f"the completion {_shortened(row['completion'])} of the prompt {_shortened(row['prompt'])}"
            return {"error": f"{file}: {name} returned {wanted}, for {case}."}
        values.append(number)
    return {"values": values}


def _shortened(value: object) -> str:
    return repr(str(value)[:VALUE_CHARACTERS])


def _describe(file: str, error: BaseException) -> str:
    """Returns the sentence for an error, with the last line of the file that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    place = file
    if lines and lines[-1]:
        place = f"{file}:{lines[-1]}"
    text = " ".join(str(error).split())[:MESSAGE_CHARACTERS]
    message = type(error).__name__
    if text:
        message += f": {text.rstrip('.')}"
    return f"{place}: {message}."


if __name__ == "__main__":
    main(*sys.argv[1:])

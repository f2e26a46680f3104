"""Calls a function in the user's own file, in a process of its own: `python own_function.py FILE FUNCTION SECONDS`.

Reads rows {"prompt", "completion", "answer"} as JSON on stdin, of which the function gets what it has parameters for. Writes
{"values": [...]}, or {"error": sentence} with the line of the file, as JSON on stdout.
"""

import inspect
import json
import math
import os
import resource
import runpy
import sys
import traceback

LARGEST = 1e9  # of a value: the squares of such values are finite in float32


def main(file: str, name: str, seconds: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints
    cpu_seconds = math.ceil(float(seconds)) + 1  # for a function that never returns, if nobody is left to end it
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    reply: dict[str, object]
    try:
        reply = {"values": call(file, name, json.load(sys.stdin))}
    except BaseException as error:  # a ValueError that is not of the file is one of `call`
        is_own = isinstance(error, ValueError) and not _line(file, error)
        reply = {"error": str(error) if is_own else _describe(file, error)}
    json.dump(reply, answers)
    answers.flush()
    os._exit(0)  # whatever threads the file has started


def call(file: str, name: str, rows: list[dict[str, object]]) -> list[float]:
    """Returns the function's value for each row. Raises ValueError for NaN, no number or beyond LARGEST, and what it raises."""
    function = runpy.run_path(file).get(name)
    if not callable(function):
        raise ValueError(f"{file} has no function {name}.")
    parameters, values = inspect.signature(function).parameters, []
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for row in rows:
        value = function(**{key: value for key, value in row.items() if takes_all or key in parameters})
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST:  # NaN too
            raise ValueError(
                f"{file}: {name} returned {str(value)[:80]!r}, where a number from -1e9 to 1e9 is wanted, for the completion "
                f"{str(row['completion'])[:80]!r} of the prompt {str(row['prompt'])[:80]!r}."
            )
        values.append(number)
    return values


def _line(file: str, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    return next((at.lineno for at in reversed(traceback.extract_tb(error.__traceback__)) if at.filename == file), None)


def _describe(file: str, error: BaseException) -> str:
    line, text = _line(file, error), " ".join(str(error).split())[:300]
    return f"{file}{f':{line}' if line else ''}: {type(error).__name__}{f': {text.rstrip(".")}' if text else ''}."


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The reader of JSON data files: objects, a line each or in an array, each with the line it begins on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (row, file:line) of each object: a line each in .jsonl; one after the other, or in an array, in .json.

    Raises UserError at what is not JSON, not an object, or not UTF-8.
    """
    try:
        read = _lines(path) if path.suffix.lower() == ".jsonl" else _values(path)
        for row, line in read:
            if not isinstance(row, dict):
                raise UserError(f"{path}:{line} should be an object, not {json_type(row)}.")
            yield row, f"{path}:{line}"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def decode_utf8(data: bytes, where: object) -> str:
    """Returns the text in `data`, without a byte order mark. Raises UserError when it is not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02X} at position {error.start}. "
            "Convert it (for example with iconv), or leave it out."
        ) from None


def json_type(value: Any) -> str:
    """Returns the type of a JSON value, for an error: `a list`, `text`, `null`."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _lines(path: Path) -> Iterator[tuple[Any, int]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = decode_utf8(line, f"{path}:{number}").strip()
            if text:
                yield _parsed(json.loads, text, where=f"{path}:{number}"), number


def _values(path: Path) -> Iterator[tuple[Any, int]]:
    text = decode_utf8(path.read_bytes(), path)
    decoder, at, line = json.JSONDecoder(), 0, 1
    between = "[,]" if text.lstrip().startswith("[") else ""
    while True:
        start = at
        while start < len(text) and (text[start].isspace() or text[start] in between):
            start += 1
        line += text.count("\n", at, start)
        if start == len(text):
            return
        value, at = _parsed(decoder.raw_decode, text, start, where=f"{path}:{line}")
        yield value, line
        line += text.count("\n", start, at)


def _parsed(parse: Callable[..., Any], *args: Any, where: str) -> Any:
    try:
        return parse(*args)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at line {error.lineno}, character {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}.") from None

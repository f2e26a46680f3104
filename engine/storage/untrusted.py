"""Reading files that somebody else made: sizes are checked before anything is allocated, and their words are quoted briefly.

Tokenizers are built by the tokenizers library, which is never trusted to fail gracefully.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import tokenizers

from engine.errors import UserError

LONGEST = 48  # characters of a file's own words that an error repeats


def quote(value: Any) -> str:
    """Returns a value from a file as an error may repeat it: quoted, printable, and short."""
    text = ascii(value if isinstance(value, str | int | float | bool | None) else type(value).__name__)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def read_exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    """Reads the next `count` bytes. Raises UserError when the file ends before."""
    data = file.read(count)
    if len(data) != count:
        raise truncation_error(path, count - len(data))
    return data


def truncation_error(path: Path, missing: int) -> UserError:
    return UserError(f"{path} ends {missing:,} bytes too soon: it was not copied or downloaded whole. Fetch it again.")


def read_json_object(path: Path, limit: int) -> dict[str, Any]:
    """Reads the object in a JSON file of at most `limit` bytes. Raises UserError when there is no such."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{path} has {size:,} bytes; {limit:,} are the most that is read of such a file.")
        with path.open("rb") as file:
            return parse_json_object(file.read(limit), path)
    except FileNotFoundError:
        raise UserError(f"There is no {path}.") from None


def parse_json_object(data: bytes, path: Path) -> dict[str, Any]:
    """Returns the JSON object in some bytes of `path`. A name given twice is an error: readers differ on it."""
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {quote(str(error))} in its JSON.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold one JSON object, not a {type(value).__name__}.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name} is given twice")
        fields[name] = value
    return fields


def parse_tokenizer(data: bytes, path: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer that a tokenizer.json describes. Raises UserError for one that the library cannot read."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text.") from None
    return build_tokenizer(lambda: tokenizers.Tokenizer.from_str(text), path)


def build_tokenizer[T](make: Callable[[], T], path: Path) -> T:
    """Calls `make`: the library raises bare Exception for what it cannot read, and a panic is no Exception at all."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{path} does not hold a tokenizer that can be read: {quote(str(error))}.") from None

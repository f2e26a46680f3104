"""What every reader of somebody else's file begins with: sizes checked before anything is allocated, names said briefly."""

import json
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import UserError

LONGEST = 48  # characters of a file's own words that an error repeats


def shown(value: Any) -> str:
    """A value from a file as an error may repeat it: quoted, printable, and short."""
    text = ascii(value if isinstance(value, str | int | float | bool | None) else type(value).__name__)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    """The next `count` bytes. Raises UserError when the file ends before."""
    data = file.read(count)
    if len(data) != count:
        raise cut_short(path, count - len(data))
    return data


def cut_short(path: Path, missing: int) -> UserError:
    return UserError(f"{path} ends {missing:,} bytes too soon: it was not copied or downloaded whole. Fetch it again.")


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes. Raises UserError when there is none, or it is something else."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{path} has {size:,} bytes; {limit:,} are the most that is read of such a file.")
        with path.open("rb") as file:
            return object_of(file.read(limit), path)
    except FileNotFoundError:
        raise UserError(f"There is no {path}.") from None


def object_of(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in some bytes of `path`. A name given twice is an error: readers differ in which one they take."""
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {shown(str(error))} in its JSON.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold one JSON object, not a {type(value).__name__}.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found

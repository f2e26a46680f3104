"""Reads untrusted files and their fields: checks sizes before allocating, and quotes values briefly."""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from engine.errors import UserError
from engine.files import read_limited

MAX_QUOTED = 48  # characters of a file's value that an error repeats
MAX_NAMED = 8  # fields that are not known, in a note
MAX_CONFIG_BYTES = 2 * 2**20


def quote(value: Any) -> str:
    """Returns a file's value for an error message: quoted, printable, and short."""
    if not isinstance(value, str | int | float | bool | None):
        value = type(value).__name__
    text = ascii(value)
    if len(text) <= MAX_QUOTED:
        return text
    return f"{text[:MAX_QUOTED]}..."


def known_name(value: Any, known: Collection[str], what: str, path: Path) -> str:
    """Returns a file's value if it is one of the `known` names. Raises UserError, which calls it
    `what`, if not.
    """
    if isinstance(value, str) and value in known:
        return value
    # Without a hint: a program wrote the value, so `qwen2_moe` is no misspelling of qwen2.
    raise UserError(f"{path}: {what} {quote(value)} is not known here; {', '.join(known)} are.")


class Fields(NamedTuple):
    """The fields of a file by name. Errors put `prefix` before a name."""

    values: dict[str, Any]
    path: Path
    prefix: str = ""

    def check(self, only: dict[str, tuple[Any, ...]]) -> None:
        """Raises UserError for a field that is in `only` and whose value is none of those there."""
        for name, values in only.items():
            if name in self.values and self.values[name] not in values:
                field = f"{self.prefix}{name} is {quote(self.values[name])}"
                raise UserError(f"{self.path}: {field}, and only {values[0]} can be computed here.")

    def note_unknown(self, known: Collection[str], harmless: str) -> tuple[str, ...]:
        """Returns a note that names the fields which are not known, if any, and do not match the
        pattern `harmless`.
        """
        unknown = [
            self.prefix + name
            for name in self.values
            if name not in known and not re.fullmatch(harmless, name)
        ]
        if not unknown:
            return ()
        more = ""
        if len(unknown) > MAX_NAMED:
            more = f" and {len(unknown) - MAX_NAMED} more"
        return (
            f"{self.path}: fields that are not known here are ignored: "
            f"{', '.join(map(quote, unknown[:MAX_NAMED]))}{more}",
        )

    def number[T: (int, float)](self, name: str, kind: type[T], default: T | None = None) -> T:
        """Returns a number field. Raises UserError for one that is missing (or null) without a
        `default`, negative or huge.
        """
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self.path} does not say {self.prefix}{name}.")
        if type(value) not in (int, kind) or not 0 <= value < 2**40:
            raise UserError(
                f"{self.path}: {self.prefix}{name} should be one number of ordinary size, not {quote(value)}."
            )
        return kind(value)

    def flag(self, name: str) -> bool:
        """Returns a boolean field, false by default; raises UserError for anything else."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {self.prefix}{name} should be true or false, not {quote(value)}.")
        return value


def build_tokenizer[T](make: Callable[[], T], path: Path) -> T:
    """Returns make(), with any error of the tokenizers library (bare Exception, or a panic, which
    is none) as a UserError.
    """
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{path} does not hold a tokenizer that can be read: {quote(str(error))}.") from None


def read_exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    """Reads so many bytes from the open file at `path`. Raises UserError when it ends before."""
    data = file.read(count)
    if len(data) != count:
        raise truncation_error(path, count - len(data))
    return data


def read_at(path: Path, offset: int, count: int) -> np.ndarray:
    """Reads (count,) uint8 at an offset, without mmap: a mapped file that is cut meanwhile ends the
    process.
    """
    data = np.fromfile(path, np.uint8, count, offset=offset)
    if len(data) < count:
        raise truncation_error(path, count - len(data))
    return data


def truncation_error(path: Path, missing: int) -> UserError:
    return UserError(
        f"{path} ends {missing:,} bytes too soon: it was not copied or downloaded whole. Fetch it again."
    )


def check_adjacent(path: Path, name: str, offset: int, end: int) -> None:
    """Raises UserError unless a tensor begins at the `end` of the one before it."""
    if offset != end:
        fault = "leaves a gap before it"
        if offset < end:
            fault = "overlaps the one before it"
        raise UserError(f"{path} is damaged: the tensor {quote(name)} {fault}.")


def read_text(path: Path, limit: int = MAX_CONFIG_BYTES) -> str:
    try:
        return read_limited(path, limit).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text.") from None


def read_json_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    return parse_json_object(read_limited(path, limit), path)


def parse_json_object(data: bytes, path: Path) -> dict[str, Any]:
    """Returns the JSON object in bytes of `path`. A name given twice is refused: readers differ on it."""
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {quote(str(error))} in its JSON.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold one JSON object, not a {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name} is given twice")
        fields[name] = value
    return fields

"""Tokenizers from files: built by the tokenizers library, which is never trusted to fail gracefully."""

from collections.abc import Callable
from pathlib import Path

import tokenizers

from engine.errors import UserError
from engine.storage.reading import shown


def from_json(data: bytes, path: Path) -> tokenizers.Tokenizer:
    """The tokenizer a tokenizer.json describes. Raises UserError for one that the library cannot read."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text.") from None
    return built(lambda: tokenizers.Tokenizer.from_str(text), path)


def built[T](make: Callable[[], T], path: Path) -> T:
    """What `make` returns. The library raises bare Exception for what it cannot read, and a panic is no Exception at all."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{path} does not hold a tokenizer that can be read: {shown(str(error))}.") from None

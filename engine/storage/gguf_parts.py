"""Names the files of a GGUF model that lies in parts, as llama.cpp's `llama-gguf-split` and the hub name them."""

import re

from engine.errors import UserError

PART = re.compile(r"(.+)-(\d{5})-of-(?!00000)(\d{5})\.gguf", re.ASCII | re.DOTALL)


def part_names(name: str) -> list[str]:
    """Returns the names of all files of a model, the first first: `x-00001-of-00002.gguf` has one more,
    and any other name none.

    `name`: of the first part, with or without folders. Raises UserError for another part.
    """
    match = PART.fullmatch(name)
    if match is None:
        return [name]
    stem = match[1]
    number = int(match[2])
    count = int(match[3])
    if number != 1:
        first = f"{stem}-00001-of-{match[3]}.gguf"
        raise UserError(f"{name} is part {number:,} of a model in {count:,}: name the first, {first}.")
    return [f"{stem}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]


def is_later_part(name: str) -> bool:
    """Whether a name is that of a part of a model, and not of the first."""
    match = PART.fullmatch(name)
    return match is not None and int(match[2]) != 1


def without_part(name: str) -> str:
    """Returns a file's name without `.gguf`, and without the number of a part."""
    match = PART.fullmatch(name)
    if match is None:
        return name.removesuffix(".gguf")
    return match[1]

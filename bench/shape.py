"""The shape of a model and its batch, as benches write it on a command line: LAYERSxWIDTHxTOKENSxBATCH."""

from typing import NamedTuple

from engine.errors import UserError


class Shape(NamedTuple):
    """A model and its batch; heads are 64 wide."""

    layers: int
    width: int
    tokens: int
    batch: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def parse_shape(flag: str, text: str) -> Shape:
    """'6x384x256x16' -> Shape(6, 384, 256, 16). Raises UserError, naming the flag, when it is not one, or its width not a
    multiple of a head's 64."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts) or int(parts[1]) % 64:
        raise UserError(f"{flag} is LAYERSxWIDTHxTOKENSxBATCH with a width in 64s, such as 6x384x256x16, not {text!r}.")
    return Shape(*map(int, parts))


def check_rounds(rounds: int, least: int = 3) -> None:
    """Raises UserError for fewer rounds than show a spread."""
    if rounds < least:
        raise UserError(f"--rounds must be at least {least}, not {rounds}.")

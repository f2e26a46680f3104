"""Exceptions for bad input, with messages that say how to correct it; and Range, which checks a number."""

import difflib
import importlib.util
from typing import Any, NamedTuple

# of the extra `serve`
SERVE_PACKAGES = ("starlette", "uvicorn", "h11", "msgspec", "prometheus_client")


class UserError(ValueError):
    """Says in one or two sentences what was wanted, what came, and what to do. Commands print them
    and exit with code 2.
    """


class InvalidField(UserError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field

    def __str__(self) -> str:
        return self.args[1]


class Range(NamedTuple):
    """A field's range: from `least` (or `above` it) to `most`, which may be infinite. `note`
    explains one bound.
    """

    least: float
    most: float
    integer: bool = False
    above: bool = False
    note: str = ""

    def __str__(self) -> str:
        if self.most == float("inf"):
            if self.above:
                return f"above {self.least:g}"
            return f"at least {self.least:g}"
        if self.above:
            return f"above {self.least} and at most {self.most}{self.note}"
        return f"between {self.least}{self.note} and {self.most}"

    def holds(self, value: float) -> bool:
        """Returns whether a number is in range."""
        if not self.least <= value <= self.most:
            return False
        if self.above and value == self.least:
            return False
        return not self.integer or value == int(value)

    def check(self, name: str, value: Any, field: str | None = None) -> None:
        """Raises InvalidField for `field` (by default `name`) when the value is out of range."""
        kinds = int if self.integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
            wanted = "an integer" if self.integer else "a number"
            shown = f"{value!r:.60}"
        elif not self.holds(value):
            wanted = str(self)
            if abs(value) < 10**30:
                shown = str(value)
            else:
                shown = "a number of more than 30 digits"
        else:
            return
        raise InvalidField(field or name, f"{name} must be {wanted}, not {shown}.")


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Returns ` Did you mean 'demo'?`, with the known name that `name` misspells or begins, or an
    empty string.
    """
    beginnings = [full for full in known if name and full.startswith(name)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or beginnings
    if close:
        return f" Did you mean {close[0]!r}?"
    return ""


def require_serve_packages(command: str) -> None:
    """Raises UserError when a package of the extra `serve` is missing. `command` follows `python
    -m`.
    """
    missing = [name.replace("_", "-") for name in SERVE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The server needs {', '.join(missing)}: "
            f"start it with `uv run --extra serve python -m {command}`, "
            "or install the extra with `pip install -e '.[serve]'`."
        )

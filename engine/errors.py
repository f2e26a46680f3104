"""Exceptions for bad input, with messages that say how to correct it."""

import difflib
import importlib.util

SERVE_PACKAGES = ("starlette", "uvicorn", "h11", "msgspec", "prometheus_client")  # of the extra `serve`


class UserError(ValueError):
    """Says in one or two sentences what was wanted, what came, and what to do. Commands print them and exit with code 2."""


class InvalidField(UserError):
    """A UserError that also names the wrong `field` of a request or of an options object."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field

    def __str__(self) -> str:
        return self.args[1]


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Returns ` Did you mean 'demo'?`, with the known name that `name` misspells or begins, or an empty string."""
    beginnings = [full for full in known if name and full.startswith(name)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or beginnings
    return f" Did you mean {close[0]!r}?" if close else ""


def require_serve_packages(command: str) -> None:
    """Raises UserError when a package of the extra `serve` is missing; `command` follows `python -m`."""
    if missing := [name.replace("_", "-") for name in SERVE_PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"The server needs {', '.join(missing)}: start it with `uv run --extra serve python -m {command}`, or install the "
            "extra with `pip install -e '.[serve]'`."
        )

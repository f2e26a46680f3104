"""The exceptions that a person can mend: bad input, told in one or two sentences."""


class UserError(ValueError):
    """Says what was wanted, what came, and what to do. Commands print its text and exit with code 2; no traceback."""


class InvalidField(UserError):
    """Says which `field` of a request or of an options object is wrong, beside the sentence for the person."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field

    def __str__(self) -> str:
        return self.args[1]


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Returns ` Did you mean 'demo'?`, naming the closest of the known names, for the end of an error; else an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f" Did you mean {close[0]!r}?" if close else ""

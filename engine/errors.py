"""The one exception a person can mend: bad input, said in one or two sentences."""


class UserError(ValueError):
    """What was wanted, what came, and what to do. Commands print its text and exit with code 2; no traceback."""


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """` did you mean 'demo'?` or an empty string: the closest of the known names, for the end of an error."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f" Did you mean {close[0]!r}?" if close else ""

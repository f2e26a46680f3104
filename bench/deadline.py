"""Holds the moment after which this process adds no round to a measurement, as --seconds sets it."""

import math
import time

_end = math.inf


def set_deadline(seconds: float | None) -> None:
    """Sets the deadline to so many seconds from now; None: to none."""
    global _end
    _end = math.inf
    if seconds is not None:
        _end = time.monotonic() + seconds


def is_past_deadline() -> bool:
    return time.monotonic() >= _end

"""Admission control: replies 429 when slots and queue are full. Decided by counting, before any other work."""

import itertools

from stages.serve.errors import ApiError


class Admission:
    """Counts the requests in slots and in the queue, and refuses all once `draining` is set.

    A request takes one place, however many completions it asks for: a large one is let in as easily as a small one. Also
    counts the bytes of all request bodies that are not decoded yet.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots, self.limit = slots, slots + queue
        self.reserved = 0
        self.draining = False
        self.body_bytes, self.max_body_bytes = 0, 64 * 2**20
        self._tickets = itertools.count(1)
        self._seconds = 1.0 / slots  # between the ends of two requests, as a moving average

    def check_open(self) -> None:
        """Raises ApiError when the server is shutting down."""
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="draining", headers={"Retry-After": "5"})

    def check(self) -> None:
        """Raises ApiError when no more requests are admitted."""
        self.check_open()
        if self.reserved >= self.limit:
            wait = min(60, max(1, round(self._seconds * max(1, self.reserved - self.slots))))
            message = f"{self.reserved} requests are being answered or wait, and no more are taken in. Try again in {wait} s."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})

    def reserve(self) -> int:
        """Takes a place, until `release`. Returns its ticket: the lowest is served first. Raises ApiError."""
        self.check()
        self.reserved += 1
        return next(self._tickets)

    def release(self) -> None:
        """Frees the place of a request."""
        self.reserved -= 1

    def record(self, seconds: float) -> None:
        """Records the time from a request's arrival to its end, while it is reserved; Retry-After is estimated from it.

        Divided by the requests under way it is the mean time between two ends (Little 1961, L = lambda W).
        """
        self._seconds = 0.9 * self._seconds + 0.1 * seconds / self.reserved

    def add_bytes(self, count: int) -> None:
        """Adds received bytes to `body_bytes`, until `remove_bytes`. Raises ApiError, and adds none, for too many."""
        if self.body_bytes + count > self.max_body_bytes:
            message = f"Bodies of {self.body_bytes:,} bytes are coming in, and no more are taken in at once. Try again in 1 s."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1", "Connection": "close"})
        self.body_bytes += count

    def remove_bytes(self, count: int) -> None:
        """Takes decoded or abandoned bytes off `body_bytes`."""
        self.body_bytes -= count

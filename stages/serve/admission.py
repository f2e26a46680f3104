"""Admission control: replies 429 when slots and queue are full. Decided by counting, before any other work."""

from stages.serve.errors import ApiError


class Admission:
    """Counts the completions in slots and in the queue, and refuses all once `draining` is set.

    Also counts the bytes of all request bodies that are not decoded yet.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots, self.limit = slots, slots + queue
        self.reserved = 0
        self.draining = False
        self.body_bytes, self.max_body_bytes = 0, 64 * 2**20
        self._seconds = 1.0  # of a completion, as a moving average

    def check_open(self) -> None:
        """Raises ApiError when the server is shutting down."""
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="draining", headers={"Retry-After": "5"})

    def check(self, count: int = 1) -> None:
        """Raises ApiError when `count` more completions cannot be admitted."""
        self.check_open()
        if self.reserved + count > self.limit:
            wait = min(60, max(1, round(self._seconds * max(1, self.reserved - self.slots) / self.slots)))
            message = f"{self.reserved} requests are being answered or wait, and no more are taken in. Try again in {wait} s."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})

    def reserve(self, count: int) -> None:
        """Adds `count` completions, all or none, to `reserved`; the caller takes them off. Raises ApiError."""
        if count > self.limit:
            message = f"{count} completions were asked for at once, prompts times n; at most {self.limit} are made at once."
            raise ApiError(400, message, param="n")
        self.check(count)
        self.reserved += count

    def record(self, seconds: float) -> None:
        """Records the duration of a completion; Retry-After is estimated from them."""
        self._seconds = 0.9 * self._seconds + 0.1 * seconds

    def add_bytes(self, count: int) -> None:
        """Adds received bytes to `body_bytes`; the caller takes them off. Raises ApiError, and adds none, for too many."""
        if self.body_bytes + count > self.max_body_bytes:
            message = f"Bodies of {self.body_bytes:,} bytes are coming in, and no more are taken in at once. Try again in 1 s."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1", "Connection": "close"})
        self.body_bytes += count

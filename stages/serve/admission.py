"""Who is let in: at most so many requests at once in slots and before them. Decided by counting, before any other work."""

from stages.serve.errors import Refused


class Seats:
    """Places taken by one HTTP request; `leave` gives them back, once."""

    def __init__(self, door: "Door", count: int) -> None:
        self._door, self._count = door, count

    def leave(self) -> None:
        self._door.taken -= self._count
        self._count = 0


class Door:
    """`slots` requests can be answered at once and `queue` more may wait. After `close` nobody is let in."""

    def __init__(self, slots: int, queue: int) -> None:
        self.slots, self.queue = slots, queue
        self.taken = 0
        self.draining = False
        self._seconds = 1.0  # that a request takes, of late

    @property
    def places(self) -> int:
        return self.slots + self.queue

    def check(self) -> None:
        """Raises Refused when there would be no place for anybody."""
        if self.draining:
            raise draining()
        if self.taken >= self.places:
            raise self._full()

    def enter(self, count: int) -> Seats:
        """Places for `count` completions, all or none. Raises Refused."""
        if count > self.places:
            raise Refused(
                400,
                f"{count} completions were asked for at once, prompts times n; at most {self.places} are made at once.",
                param="n",
            )
        self.check()
        if self.taken + count > self.places:
            raise self._full()
        self.taken += count
        return Seats(self, count)

    def close(self) -> None:
        self.draining = True

    def note(self, seconds: float) -> None:
        """A request took so long."""
        self._seconds = 0.9 * self._seconds + 0.1 * seconds

    def _full(self) -> Refused:
        wait = min(60, max(1, round(self._seconds * max(1, self.taken - self.slots) / self.slots)))
        return Refused(
            429, f"{self.taken} requests are being answered or wait, which is all that is taken in. Try again in {wait} s.",
            code="rate_limit_exceeded", headers={"Retry-After": str(wait)},
        )  # fmt: skip


def draining() -> Refused:
    return Refused(503, "The server is shutting down.", code="draining", headers={"Retry-After": "5"})

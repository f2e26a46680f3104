"""Admission control: replies 429 when slots and queue are full, and holds places for who comes again."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from stages.serve.errors import ApiError

LATE_SECONDS = 2.0  # that a client may come later than Retry-After said
MAX_REFUSALS = 256  # that are remembered, each for at most 62 seconds


class Sender(NamedTuple):
    """Tells a request that comes again from others, by nothing of its text."""

    # Of the client's connection, which it may keep.
    port: int
    # The client's address, the namespace of its key, and the size of its request.
    group: tuple[str, str, int]


class Place(NamedTuple):
    """The place of a request that was let in."""

    # The lowest is served first.
    priority: int
    # How many requests had places when it came, itself counted.
    company: int


class Refusal(NamedTuple):
    """What a refused request was told, and whether it heeds it."""

    # When it may come again.
    due: float
    # Whether it stands in line: not if it came sooner than it was told.
    in_line: bool
    # Whether it came again, or its client does not count its tries, so that nobody knows.
    returned: bool


class Admission:
    """Counts the requests in slots and in the queue, and refuses all once `draining` is set.

    A request takes one place, however many completions it asks for: a large one is let in as easily
    as a small one. Refused requests stand in line, in the order of their first refusal, and places
    are held for the first of them: half the queue's, so that slots are never empty for it; none
    without a queue. Also counts the bytes of all request bodies whose text has not become tokens
    yet.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots = slots
        self.limit = slots + queue
        self.held_places = (queue + 1) // 2
        self.reserved = 0
        self.refusals: dict[Sender, Refusal] = {}
        self.draining = False
        self.body_bytes = 0
        self.max_body_bytes = 64 * 2**20
        self._priorities = itertools.count(1)
        self._seconds = 1.0 / slots  # between the ends of two requests, as a moving average

    def check_open(self) -> None:
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="draining", headers={"Retry-After": "5"})

    def check(self, sender: Sender, now: float, tries: int | None = None) -> Sender:
        """Raises ApiError unless a place is free beside those held for others.

        Returns who in the line comes again.

        That is the sender itself on the same connection, else the first of its group whose time has
        come. `tries`: how often the request was sent before, by the client's own count; such a
        client may send many requests over one connection.
        """
        self.check_open()
        refusals = {each: last for each, last in self.refusals.items() if now <= last.due + LATE_SECONDS}
        self.refusals = refusals
        line = [each for each, last in refusals.items() if last.in_line]
        if tries is not None:
            sender = self._counted_sender(sender, line, tries)
        early = sender in refusals and now < refusals[sender].due
        again = [
            each for each in line if tries != 0 and each.group == sender.group and refusals[each].due <= now
        ]
        if early and not refusals[sender].in_line:
            again = []  # those are others' places
        own = sender
        if again and sender not in again:
            own = again[0]
        if again and tries:  # before those that may never come again
            line = [each for each in line if each == own or refusals[each].returned]
        ahead = line.index(own) if again else len(line)
        free = self.limit - self.reserved
        if free > min(ahead, self.held_places):
            return own
        wait = self._wait(ahead, free)
        if not again and not early:
            refusals.pop(own, None)  # to the end of the line
        mates = sum(each.group == own.group for each in line)
        if own in refusals or (len(refusals) < MAX_REFUSALS and mates < max(1, self.held_places)):
            refusals[own] = Refusal(now + wait, bool(again) or not early, tries != 0)
        busy = f"{self.reserved} requests are being answered or wait, and no more are taken in."
        message = f"{busy} Try again in {wait} s."
        raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})

    def _counted_sender(self, sender: Sender, line: list[Sender], tries: int) -> Sender:
        """Returns who in the line comes again by its tries: the first due of its group, or a new one."""
        new = sender._replace(port=-next(self._priorities))
        group = [each for each in line if tries and each.group == sender.group]
        return min(group, key=lambda each: self.refusals[each].due, default=new)

    def _wait(self, ahead: int, free: int) -> int:
        """Returns the whole seconds until a place is likely to be free behind so many in line."""
        rounds = 1 + ahead // max(1, self.held_places)
        seconds = round(self._seconds * (ahead + 1 - free))
        return min(60, max(rounds, seconds))

    def reserve(self, sender: Sender, now: float, tries: int | None = None) -> Place:
        """Takes a place, until `release`. Raises ApiError as `check`."""
        own = self.check(sender, now, tries)
        self.refusals.pop(own, None)
        self.reserved += 1
        return Place(next(self._priorities), self.reserved)

    def release(self) -> None:
        self.reserved -= 1

    @contextlib.contextmanager
    def place(self, sender: Sender, now: float, tries: int | None = None) -> Iterator[Place]:
        """Holds a place within the block. Raises ApiError as `check`."""
        place = self.reserve(sender, now, tries)
        try:
            yield place
        finally:
            self.release()

    def record(self, place: Place, seconds: float) -> None:
        """Records the time from a request's arrival to its end, from which Retry-After is estimated.

        Requests end in about the order in which they came, so in that time as many end as had
        places at its arrival; of fewer than there are slots, others could have ended beside them.
        """
        between_ends = seconds / max(self.slots, place.company)
        self._seconds = 0.9 * self._seconds + 0.1 * between_ends

    def add_bytes(self, count: int) -> None:
        """Adds received bytes to `body_bytes`, until `remove_bytes`.

        Raises ApiError, and adds none, for too many.
        """
        if self.body_bytes + count > self.max_body_bytes:
            busy = f"Bodies of {self.body_bytes:,} bytes are being read, and no more are taken in at once."
            message = f"{busy} Try again in 1 s."
            raise ApiError(
                429, message, code="rate_limit_exceeded", headers={"Retry-After": "1", "Connection": "close"}
            )
        self.body_bytes += count

    def remove_bytes(self, count: int) -> None:
        self.body_bytes -= count

"""Admission control: replies 429 when slots and queue are full, and holds places for who comes again."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from stages.serve.errors import ApiError

MAX_WAIT_SECONDS = 60  # that Retry-After says
LATE_SECONDS = 2.0  # that a client may come later than it said
MAX_REFUSALS = 256  # that are remembered, each for at most both together


class Sender(NamedTuple):
    """Tells a request that comes again from others, by nothing of its text."""

    # Of the client's connection, which it may keep.
    port: int
    # The client's address, or what a proxy calls it by; the namespace of its key; the size of its request.
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


class Attempt(NamedTuple):
    """A request that asks for a place, as the line sees it."""

    # Who in the line comes again, or its own sender.
    sender: Sender
    # Whether the sender stands in line, and its time has come.
    is_due: bool
    # Whether the sender comes sooner than it was told.
    is_early: bool
    # How many stand in line before the sender.
    ahead: int


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
        self.reserved = 0  # places
        self.refusals: dict[Sender, Refusal] = {}  # in the order of the line
        self.draining = False
        self.body_bytes = 0
        self.max_body_bytes = 64 * 2**20
        self._priorities = itertools.count(1)
        self._seconds_between_ends = 1.0 / slots  # of two requests, as a moving average

    def check_open(self) -> None:
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="draining", headers={"Retry-After": "5"})

    def check(self, sender: Sender, now: float, tries: int | None = None) -> Sender:
        """Returns who in the line comes again, or the sender itself, if there is a place for it.

        There is one if more are free than are held for those ahead of it in line.

        `tries`: how often the request was sent before, by the client's own count; such a client may
        send many requests over one connection. Raises ApiError without a place.
        """
        self.check_open()
        self._forget_overdue(now)
        attempt = self._identify(sender, now, tries)
        free = self.limit - self.reserved
        if free > min(attempt.ahead, self.held_places):
            return attempt.sender
        wait = self._wait(attempt.ahead, free)
        self._remember(attempt, now + wait, returned=tries != 0)
        busy = f"{self.reserved} requests are being answered or wait, and no more are taken in."
        message = f"{busy} Try again in {wait} s."
        raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})

    def _forget_overdue(self, now: float) -> None:
        """Forgets the refusals of those that may not come again any more."""
        self.refusals = {
            sender: refusal for sender, refusal in self.refusals.items() if now <= refusal.due + LATE_SECONDS
        }

    def _line(self) -> list[Sender]:
        """Returns those for whom places are held, in the order of their first refusal."""
        return [sender for sender, refusal in self.refusals.items() if refusal.in_line]

    def _identify(self, sender: Sender, now: float, tries: int | None) -> Attempt:
        """Returns who a request is: in the line one whose time has come, or its own sender.

        In the line it is the sender itself, on the same connection, else the first of its group.
        """
        line = self._line()
        if tries is not None:
            sender = self._counted_sender(sender, line, tries)
        is_early = sender in self.refusals and now < self.refusals[sender].due
        due = [each for each in line if each.group == sender.group and self.refusals[each].due <= now]
        if tries == 0:  # by the client's count it is a new request
            due = []
        if is_early and not self.refusals[sender].in_line:  # those are others' places
            due = []
        if not due:
            return Attempt(sender, is_due=False, is_early=is_early, ahead=len(line))
        if sender not in due:
            sender = due[0]
        if tries:  # before those that may never come again
            line = [each for each in line if each == sender or self.refusals[each].returned]
        return Attempt(sender, is_due=True, is_early=False, ahead=line.index(sender))

    def _remember(self, attempt: Attempt, due: float, *, returned: bool) -> None:
        """Remembers a refusal until `due`, if there is room. One that came too soon leaves the line."""
        sender = attempt.sender
        if not attempt.is_due and not attempt.is_early:
            self.refusals.pop(sender, None)  # to the end of the line
        mates = sum(each.group == sender.group for each in self._line())
        has_room = len(self.refusals) < MAX_REFUSALS and mates < max(1, self.held_places)
        if sender in self.refusals or has_room:
            self.refusals[sender] = Refusal(due, in_line=not attempt.is_early, returned=returned)

    def _counted_sender(self, sender: Sender, line: list[Sender], tries: int) -> Sender:
        """Returns who comes again by the tries: the first due of its group in the line, or a new sender.

        A new one has a port that no connection has.
        """
        new = sender._replace(port=-next(self._priorities))
        group = [each for each in line if tries and each.group == sender.group]
        return min(group, key=lambda each: self.refusals[each].due, default=new)

    def _wait(self, ahead: int, free: int) -> int:
        """Returns the whole seconds until a place is likely to be free behind so many in line."""
        rounds = 1 + ahead // max(1, self.held_places)  # a second for as many as places are held
        seconds = round(self._seconds_between_ends * (ahead + 1 - free))
        return min(MAX_WAIT_SECONDS, max(rounds, seconds))

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
        self._seconds_between_ends = 0.9 * self._seconds_between_ends + 0.1 * between_ends

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

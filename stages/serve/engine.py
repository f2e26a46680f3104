"""The engine's thread, which alone touches the slots: work goes in through a queue, news come out on the event loop.

Everything the event loop may read of it is a plain value that the thread replaces whole: whether it is ready, when it
last went round, how many requests there are.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from engine.inference.request import Event, Request
from engine.inference.slots import Slots
from stages.cli.compile_counter import CompileCounter

IDLE = 0.25  # seconds after which it goes round with nothing to do, to show that it can
Listen = Callable[[Event], None]
Report = Callable[[int, int], None]


class State(NamedTuple):
    """Requests that have a slot, requests that wait for one, and the share of all slots' positions that is filled."""

    running: int = 0
    waiting: int = 0
    filled: float = 0.0


class Ticket:
    """One request in the engine, from `submit` on."""

    def __init__(self, request: Request, listen: Listen) -> None:
        self.request, self.listen = request, listen
        self.id: int | None = None  # the slots' own, once they have it


class Engine:
    """Slots in a thread. `post(function, *arguments)` must run the function on the event loop, from any thread."""

    def __init__(self, slots: Slots, post: Callable[..., Any], compiles: CompileCounter) -> None:
        self._slots, self._post, self._compiles = slots, post, compiles
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._warm: Callable[[], None] = slots.warm
        self._changed: Callable[[], None] = lambda: None
        self._over = False
        self._handed = self._taken = 0  # requests; each counted by one thread
        self.cfg, self.capacity = slots.cfg, slots.capacity
        self.ready = False
        self.failed: BaseException | None = None
        self.ticked = time.monotonic()
        self._counts = 0, 0, 0.0  # running, waiting less all that were taken in, filled

    @property
    def compiled(self) -> int:
        """Programs compiled since it is ready. There should be none."""
        return self._compiles.count if self.ready else 0

    @property
    def state(self) -> State:
        """As of its last round, and of the requests it has not yet taken in."""
        running, waiting, filled = self._counts
        return State(running, waiting + self._handed, filled)

    def start(self, changed: Callable[[], None], report: Report | None = None, ahead: Iterable[tuple[str, int]] = ()) -> None:
        """Compiles every program and then serves. `changed` is posted when it is `ready` or has `failed`.

        `report` and `ahead` are those of `Slots.warm`.
        """
        self._changed = changed
        self._warm = lambda: self._slots.warm(report, ahead)
        self._thread.start()

    def submit(self, request: Request, listen: Listen) -> Ticket:
        """`listen` is called on the event loop with each of the request's events. The request must pass `check`."""
        ticket = Ticket(request, listen)
        self._handed += 1
        self._work.put(lambda: self._take(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends the request wherever it is. News that are on their way may still arrive."""
        self._work.put(lambda: self._drop(ticket))

    def do(self, work: Callable[[], None]) -> None:
        """Runs something in the engine's thread, between two steps."""
        self._work.put(work)

    def stop(self, seconds: float = 10.0) -> None:
        """Ends the thread after the step it is in."""
        self._over = True
        self._work.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._warm()
            self._compiles.reset()
            self.ready, self.ticked = True, time.monotonic()
            self._tell(self._changed)
            while not self._over:
                self._obey()
                self._note()  # who has left is gone now, not after the step
                if self._slots.busy:
                    self._deliver(self._slots.step())
                self._note()
        except BaseException as error:
            self.failed = error
            self._tell(self._changed)
            self._deliver([Event(id, [], [], "error", 0) for id in self._tickets])
            while not self._over:  # whoever still comes is told the same
                self._work.get()()

    def _obey(self) -> None:
        """All the work that has come in; waits a moment for some when there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            if not self._slots.busy:
                self._work.get(timeout=IDLE)()
            while True:
                self._work.get_nowait()()

    def _take(self, ticket: Ticket) -> None:
        self._taken += 1
        if self.failed:
            self._tell(ticket.listen, Event(0, [], [], "error", 0))
            return
        ticket.id = self._slots.submit(ticket.request)
        self._tickets[ticket.id] = ticket

    def _drop(self, ticket: Ticket) -> None:
        if ticket.id in self._tickets and not self.failed:
            del self._tickets[ticket.id]
            self._slots.cancel(ticket.id)

    def _deliver(self, events: list[Event]) -> None:
        news = [(self._tickets[event.id].listen, event) for event in events if event.id in self._tickets]
        for event in events:
            if event.finish_reason:
                self._tickets.pop(event.id, None)
        if news:
            self._tell(_listened, news)

    def _note(self) -> None:
        self.ticked = time.monotonic()
        slots = self._slots
        filled = slots.used_positions / (slots.slots * slots.capacity)
        self._counts = slots.running, len(slots.waiting) - self._taken, filled

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._post(function, *arguments)


def _listened(news: list[tuple[Listen, Event]]) -> None:
    for listen, event in news:
        listen(event)

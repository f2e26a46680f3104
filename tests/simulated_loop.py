"""An event loop for asyncio without files and threads, whose clock goes on at once to when something is due.

asyncio's own loop in Python, which asks the system for files that are ready at each turn, takes
longer than what it runs here.
"""

import asyncio
import collections
import contextvars
import heapq
import itertools
import sys
from asyncio.events import _set_running_loop
from collections.abc import Callable, Coroutine
from typing import Any

RESOLUTION = 1e-9  # seconds: what is due so soon after something else is due with it


class Handle:
    """A callback that is due; None once it is cancelled."""

    __slots__ = ("arguments", "callback", "context")

    def __init__(
        self, callback: Callable[..., Any], arguments: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        self.callback: Any = callback
        self.arguments, self.context = arguments, context

    def cancel(self) -> None:
        self.callback, self.arguments, self.context = None, (), None


class SimulatedLoop(asyncio.AbstractEventLoop):
    """Runs what is ready in turns, in the order in which it became so; among what is due at one time, as it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._ready: collections.deque[Handle] = collections.deque()
        self._timers: list[tuple[float, int, Handle]] = []  # a heap
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coroutine, loop=self, **options)

    def call_soon(self, callback: Callable[..., Any], *arguments: Any, context: Any = None) -> Any:
        self._ready.append(handle := Handle(callback, arguments, context))
        return handle

    call_soon_threadsafe = call_soon

    def call_at(self, when: float, callback: Callable[..., Any], *arguments: Any, context: Any = None) -> Any:
        heapq.heappush(
            self._timers, (when, next(self._numbers), handle := Handle(callback, arguments, context))
        )
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., Any], *arguments: Any, context: Any = None
    ) -> Any:
        return self.call_at(self.now + delay, callback, *arguments, context=context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise AssertionError(context)

    def run(self, main: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine to its end. Raises what it raises, and AssertionError when everybody
        waits for somebody else.
        """
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(
            finalizer=lambda generator: self.call_soon(lambda: self.create_task(generator.aclose()))
        )
        _set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self._turn()
            return task.result()
        finally:
            _set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _turn(self) -> None:
        ready, timers = self._ready, self._timers
        if not ready:
            due = self._next()
            assert due is not None, "everybody waits for somebody else"
            self.now += max(0.0, due - self.now)
        while timers and timers[0][0] < self.now + RESOLUTION:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.context:
                handle.context.run(handle.callback, *handle.arguments)
            elif handle.callback:
                handle.callback(*handle.arguments)

    def _next(self) -> float | None:
        while self._timers and not self._timers[0][2].callback:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def is_free(self, seconds: float) -> bool:
        """Whether nothing is due for so long."""
        due = self._next()
        return not self._ready and due is not None and due > self.now + seconds + RESOLUTION

    async def sleep(self, seconds: float) -> None:
        """As asyncio.sleep, without a turn of the loop where nothing else is due meanwhile."""
        if self.is_free(seconds):
            self.now += seconds
        else:
            await asyncio.sleep(seconds)

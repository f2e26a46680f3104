"""Runs an `Engine` in a thread that alone steps it: requests come by a queue, events go to the event loop.

The event loop may read the engine's counts meanwhile; they may then be one step old. New stacks of
adapters may come from any thread.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from engine.counting.xla import CompileCounter
from engine.inference.engine import Engine
from engine.inference.request import Event, Request

IDLE_SECONDS = 0.25  # between ticks without work: signs of life
# An engine without a sign of life counts as stuck after STUCK_SECONDS. While it runs a program that
# has taken longer before, it does so after STUCK_TIMES the longest run. /health promises 5 s and
# three times: both are a little less.
STUCK_SECONDS = 4.0
STUCK_TIMES = 2.8
# A program's first run may take so long, or as long as the start took, whichever is more.
FIRST_SECONDS = 60.0
STOP_SECONDS = 10.0  # for a step to end
Listener = Callable[[Event], None]


class Wait(msgspec.Struct):
    """The program that the engine runs, if any, and for how long the engine has given no sign of life.

    It counts as stuck after `stuck_after` seconds, which follow from the longest run of that
    program so far.
    """

    program: str | None
    seconds: float
    stuck_after: float


class EngineThread:
    """The thread of one engine.

    It is `ready` once its programs are loaded. Where it has an `error`, it died of that and answers
    no more.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cfg = engine.cfg
        self.capacity = engine.capacity
        self._compiles = CompileCounter()
        self.ready = False
        self.error: BaseException | None = None
        self.last_tick = time.monotonic()
        self._start_seconds = 0.0  # that compiling all programs, and running each, has taken
        self.kv_cache_usage = 0.0  # share of the KV cache that is filled
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}  # by request id
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._submitted = 0  # requests, by the event loop
        self._received = 0  # requests, by the thread

    @property
    def compiles_after_ready(self) -> int:
        return self._compiles.count if self.ready else 0

    @property
    def waiting(self) -> int:
        """Requests without a slot, those too that the thread has not received yet."""
        return self.engine.waiting + self._submitted - self._received

    @property
    def seconds_since_tick(self) -> float:
        return time.monotonic() - self.last_tick

    @property
    def wait(self) -> Wait:
        times = self.engine.step_times
        running = times.running
        if running is None:
            seconds = time.monotonic() - max(self.last_tick, times.changed)
            return Wait(None, round(seconds, 3), STUCK_SECONDS)
        seconds = round(time.monotonic() - running.since, 3)
        longest = times.longest(running)
        if longest is None:
            stuck_after = max(FIRST_SECONDS, round(self._start_seconds, 3))
        else:
            stuck_after = max(STUCK_SECONDS, round(STUCK_TIMES * longest, 3))
        return Wait(running.name, seconds, stuck_after)

    def start(self, on_change: Callable[[], None], *warm_arguments: Any) -> None:
        """Starts the thread, which compiles the programs and then serves. To be called on the event loop.

        `on_change` is called on it once the engine is `ready` and if it has an `error`.
        `warm_arguments`: of `Engine.warm`.
        """
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._run, args=(on_change, warm_arguments), daemon=True, name="engine"
        )
        self._thread.start()

    def submit(self, request: Request, priority: int, listener: Listener) -> Callable[[], None]:
        """Submits a request that passes `check_request`. Returns a function that cancels it.

        `priority`: as of `Engine.submit`. `listener` gets its events on the event loop, perhaps a few
        more after it was cancelled.
        """
        request_id = 0  # of the engine, once the thread has received it

        def receive() -> None:
            nonlocal request_id
            self._received += 1
            if self.error:
                self._post(listener, Event(request_id, [], "error"))
                return
            request_id = self.engine.submit(request, priority)
            self._listeners[request_id] = listener

        def cancel() -> None:  # comes behind `receive` in the queue
            if self._listeners.pop(request_id, None):
                self.engine.cancel(request_id)

        self._submitted += 1
        self._work.put(receive)
        return functools.partial(self._work.put, cancel)

    async def call[T](self, function: Callable[[], T]) -> T:
        """Returns or raises what a function does in the engine's thread, behind all submitted before."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._work.put(run)
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Ends the thread after its step, and waits for that a few seconds."""
        self._stopping = True
        self._work.put(lambda: None)
        if self._thread:
            self._thread.join(STOP_SECONDS)

    def _run(self, on_change: Callable[[], None], warm_arguments: tuple[Any, ...]) -> None:
        """Compiles the programs, and then ticks until `stop`; after an error every request ends by it."""
        try:
            begin = time.monotonic()
            self.engine.warm(*warm_arguments)
            self._compiles.reset()
            self.last_tick = time.monotonic()
            self._start_seconds = self.last_tick - begin
            self.ready = True
            self._post(on_change)
            while not self._stopping:
                self.tick()
        except BaseException as error:
            self.error = error
            self._post(on_change)
            self._deliver([Event(id, [], "error") for id in self._listeners])
            while not self._stopping:  # later requests get the same event
                self._work.get()()

    def tick(self) -> None:
        """Does the work in the queue and a step of the engine. For the thread alone, or in its place."""
        self._take_work()
        self.last_tick = time.monotonic()
        self.kv_cache_usage = self.engine.used_positions / (self.engine.config.slots * self.capacity)
        if self.engine.busy:
            self._deliver(self.engine.step())

    def _take_work(self) -> None:
        """Runs all work in the queue; waits up to IDLE_SECONDS for some if there is no request."""
        with contextlib.suppress(queue.Empty):
            if not self.engine.busy:
                self._work.get(timeout=IDLE_SECONDS)()
            while True:
                self._work.get_nowait()()

    def _deliver(self, events: list[Event]) -> None:
        """Has the event loop call the listeners of these events; forgets those whose request has ended."""
        addressed = [(self._listeners[event.id], event) for event in events if event.id in self._listeners]
        for event in events:
            if event.finish_reason:
                self._listeners.pop(event.id, None)

        def call_listeners() -> None:
            for listener, event in addressed:
                listener(event)

        if addressed:
            self._post(call_listeners)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Has the event loop call a function."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

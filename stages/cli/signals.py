"""Handles Ctrl-C, SIGTERM and a closed terminal at any moment: finishes a step that must be saved, and stops all else at once.

Python runs a signal's handler only when the main thread comes back from a library, where compiling or a long step can
keep it for minutes. So a second thread reads the signals: it prints what will happen, ends the process if the main
thread does not, and ends it at once on a second signal. SIGHUP is never the second one: a terminal that closes sends it,
and so does the shell in it. Where it is ignored, as under nohup, it stays so.
"""

import contextlib
import dataclasses
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import stages
from engine.mesh import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOW_CURSOR = "\x1b[?25h"
NUDGE, PATIENCE = 0.1, 1.0  # seconds for the main thread to hear of a signal, and to end


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal, where nothing has to be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclasses.dataclass
class SignalState:
    """The signals of one block. `answer`: printed for the first one if it is deferred, else None.

    `phase` is printed after "Stopped"; `received`: the first signal; `seen`: whether the main thread knows of it.
    """

    answer: str | None = None
    print: Callable[[str], None] = stages.write_stderr
    received: int | None = None
    seen: bool = False
    phase: str = ""

    def handle(self, number: int, _: object) -> None:
        """Handles a signal in the main thread: raises Stopped at the first one, unless it is deferred; ignores later ones."""
        self.received = self.received or number
        again, self.seen = self.seen, True
        if self.answer is None and not again:  # at a second signal the second thread ends the process
            raise Stopped(number)

    def listen(self, signals: int) -> None:
        """Reads signals in the second thread until a zero byte arrives: prints `answer`; ends the process at a second signal.

        Without an `answer` the main thread has PATIENCE seconds to end it.
        """
        answered = echo = False
        waits: list[float] = []  # before the main thread is nudged, and before the process is ended
        while True:
            if not select.select([signals], [], [], waits[0] if waits else None)[0]:
                waits.pop(0)
                if not waits:
                    self.end_now(self.phase)
                elif not self.seen:  # it was about to sleep in a library when the signal came, and sleeps through it
                    echo = True
                    signal.pthread_kill(threading.main_thread().ident or 0, self.received or signal.SIGINT)
                continue
            number = os.read(signals, 1)[0]
            if number == 0:
                return
            if number not in SIGNALS:
                continue
            if echo:
                echo = False
                continue
            if answered and number == signal.SIGHUP:
                continue
            if answered:
                self.end_now("at once; what was saved before is untouched.")
            answered = True
            self.received = self.received or number
            if self.answer:
                with contextlib.suppress(OSError):  # nobody may read on; a second signal must still be heard
                    self.print(self.answer)
            else:
                waits = [NUDGE, PATIENCE]

    def end_now(self, sentence: str) -> None:
        code = 128 + (self.received or signal.SIGINT)
        stages.write_stderr(f"{SHOW_CURSOR if sys.stderr and sys.stderr.isatty() else ''}Stopped {sentence}")
        processes.end(code, "it was stopped by a signal.")  # if process 0 only left, JAX would abort the others
        os._exit(code)


_now = SignalState(phase=stages.phase)


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Handles signals in the block; does nothing outside the main thread.

    A block inside another has its own state: a signal that ended it does not end the outer one.
    """
    global _now
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _now = _now, SignalState(phase=_now.phase)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    state, report = _now, sys.unraisablehook

    def hear_again(ignored: Any) -> None:
        """Has the main thread nudged when Stopped came in a callback, as JAX has one in gc, from which nothing is raised."""
        if isinstance(ignored.exc_value, Stopped):
            state.seen = False
        else:
            report(ignored)

    def print_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Prints no Stopped: NumPy's import prints what it catches, when jaxlib begins it."""
        if not issubclass(kind, Stopped):
            print_before(kind, error, trace)

    print_before, sys.excepthook = sys.excepthook, print_error
    sys.unraisablehook = hear_again
    heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = [(number, signal.signal(number, _now.handle)) for number in heard]
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_now.listen, args=(reading,), daemon=True, name="signals")
    thread.start()
    try:
        yield
    except Exception:  # jaxlib makes an ImportError of a signal that comes while it is being imported
        if state.received and state.answer is None:
            raise Stopped(state.received) from None
        raise
    finally:
        stages.phase = state.phase  # for a signal that comes from here on
        sys.excepthook = print_before
        if sys.unraisablehook is hear_again:  # storage replaces it where an error leaves callbacks to come
            sys.unraisablehook = report
        signal.set_wakeup_fd(wakeup)
        for number, handler in before:
            signal.signal(number, handler)
        os.write(writing, b"\0")
        thread.join(PATIENCE)
        os.close(writing)
        os.close(reading)
        _now = outer


def set_phase(phase: str) -> None:
    """Sets what is printed after "Stopped" when a signal comes."""
    _now.phase = stages.phase = phase


@contextlib.contextmanager
def defer_signals(answer: str, print: Callable[[str], None]) -> Iterator[SignalState]:
    """Defers a first signal to the end of the block: `answer` is printed at once, and `received` tells the block to end."""
    _now.print, _now.answer = print, answer
    try:
        yield _now
    finally:
        _now.answer = None


def report_stop(stopped: Stopped) -> int:
    """Prints in which phase the command was stopped; returns the exit code."""
    print(f"\nStopped {stages.phase}", file=sys.stderr, flush=True)
    return 128 + stopped.number

"""Handles Ctrl-C, SIGTERM and a closed terminal: finishes a step that must be saved, else ends the process.

Python runs a signal's handler only when the main thread comes back from a library, where compiling
or a long step can keep it for minutes. So a second thread reads the signals from Python's wake-up
file descriptor. It prints what will happen and ends the process: at once, or at a second signal
where the first one is deferred. SIGHUP is never the second one: a terminal that closes sends it,
and so does the shell in it. Where it is ignored, as under nohup, it stays so.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import NoReturn

from engine.files import discard_unfinished
from engine.subprocesses import kill_programs
from stages.cli import lifecycle, start

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WAKE = signal.SIGURG  # ends a system call in which the main thread waits
WAKE_EVERY = 0.05  # seconds
ANSWERED_WITHIN = 0.5  # seconds, after which a second signal is listened for anyway
HEARD_WITHIN = 5.0  # seconds: a signal that the main thread knows of, by the second thread


@dataclasses.dataclass
class Deferral:
    """A block that ends by itself once one of `signals` was `received`; `say` gets the `answer` to it
    at once.

    With `interrupts` the signal raises KeyboardInterrupt in the block. The main thread may hear of it
    first; `answered` is set once the second thread has.
    """

    answer: str
    say: Callable[[str], None]
    signals: Collection[int]
    interrupts: bool = False
    received: int | None = None
    answered: threading.Event = dataclasses.field(default_factory=threading.Event)

    def receive(self, number: int) -> None:
        if number in self.signals:
            self.received = self.received or number


_deferral: Deferral | None = None


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handled = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = [(number, signal.signal(number, _handle)) for number in (*handled, WAKE)]
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reading,), daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before:
            signal.signal(number, handler)
        os.write(writing, b"\0")
        thread.join()
        os.close(writing)
        os.close(reading)


def _handle(number: int, _: object) -> None:
    """Lets the main thread stop after the step in which the signal came, not one later."""
    if _deferral:
        _deferral.receive(number)
        if _deferral.interrupts and number in _deferral.signals:
            raise KeyboardInterrupt


def _listen(pipe: int) -> None:
    """Reads signals until a zero byte arrives: defers them, or ends the process."""
    while True:
        number = os.read(pipe, 1)[0]
        if not number:
            return
        deferral = _deferral
        if number not in SIGNALS:
            continue
        if deferral is None or number not in deferral.signals:
            end_now(number, start.phase)
        elif not deferral.answered.is_set():
            deferral.receive(number)
            deferral.answered.set()
            # in a thread: a pipe that nobody reads may be full, and a second signal must still be
            # heard
            if deferral.answer:
                printing = threading.Thread(
                    target=_print_answer, args=(deferral,), daemon=True, name="answer"
                )
                printing.start()
                printing.join(ANSWERED_WITHIN)
            if deferral.interrupts:
                _wake_main_thread(deferral)
        elif number != signal.SIGHUP:
            end_now(deferral.received or number, "at once; what was saved before is untouched.")


def _wake_main_thread(deferral: Deferral) -> None:
    """Wakes the main thread until it has left the block.

    A signal that comes after readline has printed its prompt and before it waits for a key is else
    handled at the next key.
    """
    main = threading.main_thread().ident
    while main and _deferral is deferral:
        signal.pthread_kill(main, WAKE)
        time.sleep(WAKE_EVERY)


def _print_answer(deferral: Deferral) -> None:
    with contextlib.suppress(OSError):  # nobody reads on
        deferral.say(deferral.answer)


def end_now(number: int, sentence: str) -> NoReturn:
    """Prints the sentence after "Stopped" and ends this process, and the others of its run, with
    128 + the signal.
    """
    show_cursor = "\x1b[?25h" if sys.stderr and sys.stderr.isatty() else ""
    start.write_stderr(f"{show_cursor}Stopped {sentence}")
    discard_unfinished()
    kill_programs()
    lifecycle.end(128 + number, "it was stopped by a signal.")
    os._exit(128 + number)


def set_phase(phase: str) -> None:
    """Sets what is printed after "Stopped" when a signal comes."""
    start.phase = phase


@contextlib.contextmanager
def defer_signals(
    answer: str, say: Callable[[str], None], signals: Collection[int] = SIGNALS, interrupts: bool = False
) -> Iterator[Deferral]:
    """Defers a first signal to the end of the block; the arguments are Deferral's."""
    global _deferral
    deferral = _deferral = Deferral(answer, say, signals, interrupts)
    try:
        yield deferral
    finally:
        # else the second thread would take the same signal for one after the block
        if deferral.received:
            deferral.answered.wait(HEARD_WITHIN)
        _deferral = None

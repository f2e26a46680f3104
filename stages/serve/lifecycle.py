"""Runs one server to its end: compiles, answers, drains at a signal without a time limit, checks that no weight changed."""

import asyncio
import socket
import sys
import time
import traceback

from starlette.types import ASGIApp

from engine.errors import UserError
from engine.format import duration
from engine.storage.digest import digest
from stages.cli import signals
from stages.cli.console import Console
from stages.cli.process import process_start
from stages.serve import server
from stages.serve.compile_ahead import CompileAhead
from stages.serve.engine_thread import IDLE_SECONDS, EngineThread
from stages.serve.state import REMEDY, ServerState


async def serve(
    state: ServerState, app: ASGIApp, sock: socket.socket, console: Console, ahead: CompileAhead, ready: str
) -> int:
    """Serves on the socket until a signal, then until every request under way has its reply, without a time limit.

    Prints `ready` when clients can be answered. `ahead`: the compilation under way. A second signal ends it at once.
    Returns 0 when every request had its reply, 1 when the engine failed or a weight changed.
    """
    loop, engine, changed = asyncio.get_running_loop(), state.engine, asyncio.Event()
    server.listen(sock)
    http = server.make_server(app)
    serving = asyncio.create_task(http.serve([sock]))
    await start_engine(state, ahead, changed, console)
    if not engine.error:  # the engine sets it again when it fails
        changed.clear()

    async def drain() -> None:
        state.admission.draining = True
        while state.admission.reserved and not engine.error:
            await asyncio.sleep(0.01)
        http.should_exit = True

    def on_signal(sentence: str) -> None:
        asyncio.run_coroutine_threadsafe(drain(), loop)  # first: printing fails where nobody reads on
        console.print(f"{sentence} Requests under way: {state.admission.reserved}.")

    console.print(f"ready after {duration(time.perf_counter() - process_start())}{ready}")
    with signals.defer_signals("Finishing what is under way; another signal ends it at once.", on_signal):
        failing = asyncio.create_task(changed.wait())
        reporting = asyncio.create_task(report_long_programs(engine, console))
        await asyncio.wait((serving, failing), return_when=asyncio.FIRST_COMPLETED)
        http.should_exit = True
        await serving
        failing.cancel()
        reporting.cancel()
        engine.stop()
        now = digest(engine.engine.params)
        same = "unchanged" if now == state.digest else f"CHANGED from {state.digest[:16]}"
        console.print(
            f"Stopped. Weights {same}: SHA-256 {now[:16]}; "
            f"{engine.compiles_after_ready} programs compiled since all were there."
        )
        if engine.error and isinstance(error := _explained(engine.error), UserError):
            print(f"error: {error}", file=sys.stderr)
        elif engine.error:
            traceback.print_exception(engine.error, file=sys.stderr)
        return int(bool(engine.error) or now != state.digest)


async def start_engine(state: ServerState, ahead: CompileAhead, changed: asyncio.Event, console: Console) -> None:
    """Starts the engine and waits until its programs for short texts have run once. Raises the error that ended it.

    `changed` is set when the engine is ready, and again should it fail.
    """
    with console.task("compiling", always=True) as report:
        state.engine.start(changed.set, report, ahead)
        await changed.wait()
    if error := state.engine.error:
        await asyncio.to_thread(ahead.stop)
        raise _explained(error)


async def report_long_programs(engine: EngineThread, console: Console) -> None:
    """Prints that a text waits for the programs for longer texts, once, and when these are there."""
    runner, is_reported = engine.engine.runner, False
    if runner.limit >= runner.positions:
        return
    while not engine.has_long_programs:
        if engine.engine.held_tickets and not is_reported:
            is_reported = True
            console.print(f"A text of more than {runner.limit} tokens waits: its programs are still being compiled.")
        await asyncio.sleep(IDLE_SECONDS)
    since = duration(time.perf_counter() - process_start())
    console.print(f"The programs for texts of more than {runner.limit} tokens are there too, after {since}.")


def _explained(error: BaseException) -> BaseException:
    """Returns a UserError when memory ran out, else the error."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(f"There is not enough memory to answer in so many slots; {REMEDY}")
    return error

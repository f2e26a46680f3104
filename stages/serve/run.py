"""From flags to a server that runs: address, model, programs, banner, and the way out."""

import asyncio
import importlib.metadata
import os
import time
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from stages.cli import signals
from stages.cli.command import typed_arguments

if TYPE_CHECKING:
    import socket

    from stages.cli.console import Console
    from stages.serve.compile_ahead import Ahead
    from stages.serve.flags import Serve
    from stages.serve.startup import Loaded

NEEDS = ("starlette", "uvicorn", "msgspec", "prometheus_client")


def run(given: "Serve") -> int:
    """0 when it was told to stop and everybody had their answer, 1 when the engine or the weights broke."""
    _check_installed()
    keys = _listed(given.api_key) or _listed(os.environ.get("THRICE_API_KEY"))
    from stages.serve import server as listen

    if not keys and not listen.is_local(given.host):
        raise UserError(
            f"{given.host} can be reached by others: give --api-key (or THRICE_API_KEY), or listen on 127.0.0.1 alone."
        )
    bound = listen.bind(given.host, given.port)
    with bound:
        signals.set_phase("before it was ready.")
        from stages.cli.console import Console
        from stages.serve.startup import load

        with Console() as console:
            loaded = load(given, console)
            try:
                return asyncio.run(_serve(given, loaded, bound, keys, console))
            except signals.Stopped as stopped:  # while it compiled, which nothing can end but the end of the process
                code = signals.report_stop(stopped)
                console.close_live()
                os._exit(code)
            finally:
                loaded.chat.close()


async def _serve(given: "Serve", loaded: "Loaded", bound: "socket.socket", keys: list[str], console: "Console") -> int:
    from stages.serve import server as listen
    from stages.serve.api.app import make_app
    from stages.serve.page import page

    loop = asyncio.get_running_loop()
    served = loaded.served(given, loop.call_soon_threadsafe)
    hosts = _hosts(given, bound)
    origins = frozenset(origin.lower().rstrip("/") for origin in _listed(given.allow_origin))
    app = make_app(served, page(), keys=keys, hosts=hosts, origins=origins, version=importlib.metadata.version("thrice"))
    listen.listen(bound)
    server = listen.make_server(app)
    serving = asyncio.create_task(server.serve([bound]))
    await _warm(served, loaded.ahead, console)

    async def drain() -> None:
        served.door.close()
        while served.door.taken and not served.engine.failed:
            await asyncio.sleep(0.01)
        server.should_exit = True

    def told(sentence: str) -> None:
        console.print(sentence)
        loop.call_soon_threadsafe(lambda: draining.append(loop.create_task(drain())))

    draining: list[asyncio.Task[None]] = []
    _say_ready(given, bound, keys, console)
    with signals.deferred("Finishing what is under way; another signal ends it at once.", told):
        broken = asyncio.create_task(_until_broken(served.engine))
        await asyncio.wait((serving, broken), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
        broken.cancel()
        return _close(served, console)


async def _warm(served: Any, ahead: "Ahead | None", console: "Console") -> None:
    """Compiles what is not compiled `ahead`, and runs it all once. Raises what went wrong."""
    done = asyncio.Event()
    with console.task("compiling", always=True) as report:
        served.engine.start(done.set, report, ahead or ())
        await done.wait()
    if served.engine.failed:
        if ahead:
            await asyncio.to_thread(ahead.stop)
        if "RESOURCE_EXHAUSTED" in str(served.engine.failed):
            from stages.serve.compile_ahead import FEWER

            raise UserError(f"There is not enough memory to answer in so many slots. {FEWER}")
        raise served.engine.failed


async def _until_broken(engine: Any) -> None:
    while not engine.failed:
        await asyncio.sleep(0.5)


def _close(served: Any, console: "Console") -> int:
    """Says how it went. 1 when the engine or the weights broke."""
    from engine.storage.digest import digest

    served.engine.stop()
    served.prompts.close()
    now = digest(served.params)
    same = "unchanged" if now == served.attested else f"CHANGED from {served.attested[:16]}"
    console.print(f"Stopped. Weights {same}: SHA-256 {now[:16]}; {served.engine.compiled} programs compiled after the start.")
    if served.engine.failed:
        import sys
        import traceback

        traceback.print_exception(served.engine.failed, file=sys.stderr)
    return int(bool(served.engine.failed) or now != served.attested)


def _say_ready(given: "Serve", bound: "socket.socket", keys: list[str], console: "Console") -> None:
    from engine.format import duration
    from stages.cli import process

    taken = duration(time.perf_counter() - process.process_start())
    port = bound.getsockname()[1]
    host = f"[{given.host}]" if ":" in given.host else given.host
    shown = "localhost" if host in ("0.0.0.0", "[::]") else host
    locked = f"; {len(keys)} API key{'s' * (len(keys) != 1)}, one of which every request needs" if keys else ""
    console.print(f"ready after {taken}{locked}")
    console.print(f"\npage    http://{shown}:{port}\nclients http://{shown}:{port}/v1\n\nCtrl-C ends it.")


def _hosts(given: "Serve", bound: "socket.socket") -> frozenset[str] | None:
    """Names by which the server may be called. Any where a key protects it and no names were given."""
    from stages.serve import server as listen
    from stages.serve.api import guard

    named = frozenset(host.lower() for host in _listed(given.allow_host))
    named |= frozenset(origin.lower().partition("://")[2].partition(":")[0] for origin in _listed(given.allow_origin))
    if not listen.is_local(given.host) and not named:
        return None
    own = bound.getsockname()[0]
    return guard.LOCAL | named | {given.host.lower(), f"[{own}]" if ":" in own else own}


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _check_installed() -> None:
    import importlib.util

    missing = [name.replace("_", "-") for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The server needs {', '.join(missing)}: start it with `uv run --extra serve python -m stages.serve "
            f"{' '.join(typed_arguments())}`, or install the extra with `pip install -e '.[serve]'`."
        )

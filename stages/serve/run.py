"""Runs one server from its flags to its end: binds, loads, serves, drains at a signal, checks the weights."""

import asyncio
import functools
import gc
import importlib.metadata
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from engine.device import Device, start_jax
from engine.errors import UserError
from engine.format import duration, quantity
from stages.cli import signals
from stages.cli.command import process_start
from stages.cli.console import Console
from stages.serve import server
from stages.serve.api.guard import HOST, LOCAL_HOSTS, Guard
from stages.serve.flags import ServeFlags

# Threads take turns sooner while weights are read beside compilation.
LOADING_SWITCH_SECONDS = 0.0005
GC_THRESHOLD = 2_000  # as Python has it
FOLDER_ADAPTERS = 8  # that an adapter folder has room for, without a flag

if TYPE_CHECKING:  # these import JAX, which must be started first
    from engine.inference.config import EngineConfig
    from stages.serve.compile_ahead import CompileAhead
    from stages.serve.state import ServerState


def run(flags: ServeFlags) -> int:
    """Serves until a signal. Returns the exit code of `serve`; raises UserError before it serves."""
    check_flags(flags)
    keys = api_keys(flags)
    hosts = allowed_hosts(flags)
    with server.bind(flags.host, flags.port) as sock, Console() as console:
        address, port = sock.getsockname()[:2]
        signals.set_phase("before it was ready.")
        interval = sys.getswitchinterval()
        sys.setswitchinterval(LOADING_SWITCH_SECONDS)
        device = start_jax(flags.device, one_arena=False)
        from stages.serve.api.app import Api  # imports JAX, which must be started first

        state, ahead = load_from_flags(flags, device, console)
        sys.setswitchinterval(interval)
        gc.freeze()  # what was loaded stays: garbage is looked for among the objects of requests alone
        gc.set_threshold(GC_THRESHOLD)
        if hosts is not None:
            hosts = hosts.union([_url_host(address)])
        origins = frozenset(flags.allow_origin)
        api = Api(state, importlib.metadata.version("thrice"), flags.root_path, flags.client_header)
        app = Guard(
            api,
            keys,
            hosts,
            origins,
            flags.log,
            state.metrics.count_response,
            flags.root_path,
            flags.open_metrics,
        )
        ready_message = functools.partial(_ready_message, flags.host, port, len(keys))
        try:
            return asyncio.run(serve(state, app, sock, console, ahead, ready_message))
        finally:
            state.tokenizer.close()


def load_from_flags(
    flags: ServeFlags, device: Device, console: Console
) -> tuple["ServerState", "CompileAhead"]:
    """Loads what the flags name, on their mesh. Returns and raises as `load_state`."""
    # These import JAX, which must be started first.
    import jax

    from engine.mesh.layout import make_inference_mesh
    from engine.text.documents import Documents
    from stages.serve.load import ServerOptions, load_state

    documents = None
    if flags.documents:
        documents = Documents(flags.documents)
    options = ServerOptions(
        names=_split(flags.name),
        adapters=flags.adapter,
        adapter_folder=flags.adapter_folder,
        template=flags.template,
        documents=documents,
        queue=flags.queue,
        price=flags.price,
        sampling=flags.sampling.overrides,
    )
    with jax.set_mesh(make_inference_mesh(flags.mesh)):
        config = engine_config(flags, device.backend)
        return load_state(flags.model, config, device, console, options)


def check_flags(flags: ServeFlags) -> None:
    """Raises UserError for flags that do not go together."""
    keys = api_keys(flags)
    if not keys and not server.is_local(flags.host):
        remedy = "give --api-key (or THRICE_API_KEY), or listen on 127.0.0.1 alone"
        raise UserError(f"{flags.host} can be reached by others: {remedy}.")
    check_adapters(flags, bool(keys))
    if flags.mesh and flags.weights == "q4":
        raise UserError("--weights q4 is for one device; leave --mesh out.")


def api_keys(flags: ServeFlags) -> list[str]:
    """Returns the keys of which each request needs one; none where requests need none."""
    return _split(flags.api_key) or _split(os.environ.get("THRICE_API_KEY"))


def allowed_hosts(flags: ServeFlags) -> frozenset[str] | None:
    """Returns the names under which clients may call the server; None for any, where a key protects it."""
    if not server.is_local(flags.host) and not flags.allow_host:
        return None
    names = [*_split(flags.allow_host), *proxy_hosts(flags.allow_origin), flags.host]
    return LOCAL_HOSTS | {name.lower() for name in names}


def engine_config(flags: ServeFlags, backend: str) -> "EngineConfig":
    """Returns the engine's options on a backend of JAX."""
    from engine.inference.config import EngineConfig, default_weights

    weights: Any = flags.weights or default_weights(backend)
    kv_dtype: Any = flags.keys_values
    prefix_cache_bytes = None
    if flags.prefix_cache is not None:
        prefix_cache_bytes = flags.prefix_cache * 10**6
    return EngineConfig(
        slots=flags.slots,
        capacity=flags.capacity,
        weights=weights,
        kv_dtype=kv_dtype,
        prefix_cache_bytes=prefix_cache_bytes,
        speculate=not flags.no_speculative_decoding,
        embeds=True,
        adapters=adapter_capacity(flags),
        adapter_rank=flags.max_rank,
    )


def proxy_hosts(origins: Sequence[str]) -> list[str]:
    """Returns the hosts of origins, without their ports: a proxy may pass on its own Host."""
    matches = [HOST.fullmatch(origin.partition("://")[2]) for origin in origins]
    return [match[1] for match in matches if match]


def adapter_capacity(flags: ServeFlags) -> int:
    """Returns how many adapters requests may name at once; 0 where they name none."""
    names = _named_adapters(flags)
    if not names and not flags.adapter_folder:
        return 0
    if flags.max_adapters:
        return flags.max_adapters
    if flags.adapter_folder:
        return max(len(names), FOLDER_ADAPTERS)
    return len(names)


def _named_adapters(flags: ServeFlags) -> list[str]:
    return [name for name, _ in flags.adapter if name]


def check_adapters(flags: ServeFlags, has_keys: bool) -> None:
    """Raises UserError for flags about adapters that do not go together."""
    names = _named_adapters(flags)
    count = adapter_capacity(flags)
    model_names = {"default", *_split(flags.name)}
    if flags.adapter_folder and not has_keys:
        raise UserError("--adapter-folder lets clients add adapters: give --api-key (or THRICE_API_KEY) too.")
    if flags.adapter_folder and not flags.adapter_folder.is_dir():
        raise UserError(f"There is no folder {flags.adapter_folder} for --adapter-folder.")
    if flags.max_adapters and not count:
        raise UserError(
            "--max-adapters is about adapters with a name: give --adapter NAME=FOLDER, or --adapter-folder."
        )
    if count and len(names) < len(flags.adapter):
        raise UserError(
            "An adapter without a name is part of the model, "
            "and those with a name are for the model as it is: "
            "give each a name, --adapter NAME=FOLDER."
        )
    for name in names:
        if names.count(name) > 1 or name in model_names:
            raise UserError(
                f"The name {name} is given twice: each adapter has one of its own, and none is the model's."
            )
    if len(names) > count:
        raise UserError(f"--max-adapters is {count}, and {len(names)} adapters are named.")
    if count and flags.mesh:
        raise UserError(
            "Adapters by name need the model on one device: leave --mesh out, or merge one by stages.export."
        )


def _ready_message(host: str, port: int, keys: int, seconds: float) -> str:
    """Returns what is printed when clients can be answered.

    `keys`: how many API keys there are. `seconds`: since the process started.
    """
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    url = f"http://{_url_host(host)}:{port}"
    ready = f"ready after {duration(seconds)}"
    if keys:
        ready += f"; {quantity(keys, 'API key')}, one of which every request needs"
    return f"{ready}\n\npage    {url}\nclients {url}/v1\n\nCtrl-C ends it."


def _url_host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


async def serve(
    state: "ServerState",
    app: ASGIApp,
    sock: socket.socket,
    console: Console,
    ahead: "CompileAhead",
    ready_message: Callable[[float], str],
) -> int:
    """Serves on the socket until a signal, and then until requests under way are answered or a second signal.

    When clients can be answered it prints `ready_message` of the seconds since the process started.
    `ahead`: the compilation under way. Returns the exit code: 0, or 1 when a weight changed. Raises
    the error with which the engine failed.
    """
    loop = asyncio.get_running_loop()
    engine = state.engine
    changed = asyncio.Event()
    server.listen(sock)
    http = server.make_server(app)
    serving = asyncio.create_task(http.serve([sock]))
    await start_engine(state, ahead, changed, console)
    if not engine.error:  # the engine sets it again when it fails
        changed.clear()

    async def drain() -> None:  # ends the server when all places are empty
        state.admission.draining = True
        while state.admission.reserved and not engine.error:
            await asyncio.sleep(0.01)
        http.should_exit = True

    def on_signal(sentence: str) -> None:
        asyncio.run_coroutine_threadsafe(drain(), loop)  # first: printing fails where nobody reads on
        console.print(f"{sentence} Requests under way: {state.admission.reserved}.")

    with signals.defer_signals("Finishing what is under way; another signal ends it at once.", on_signal):
        console.print(ready_message(time.perf_counter() - process_start()))
        failing = asyncio.create_task(changed.wait())
        await asyncio.wait((serving, failing), return_when=asyncio.FIRST_COMPLETED)
        http.should_exit = True
        await serving
        failing.cancel()
        engine.stop()
        is_unchanged = await report_weights(state, console)
        if engine.error:
            raise engine.error
        return int(not is_unchanged)


async def report_weights(state: "ServerState", console: Console) -> bool:
    """Prints the digest of the weights after serving. Returns whether it is that at load."""
    digest = await state.hash_weights()
    is_unchanged = digest == state.digest
    verdict = "unchanged" if is_unchanged else f"CHANGED from {state.digest[:16]}"
    console.print(
        f"Stopped. Weights {verdict}: SHA-256 {digest[:16]}; "
        f"{state.engine.compiles_after_ready} programs compiled after the server was ready."
    )
    return is_unchanged


async def start_engine(
    state: "ServerState", ahead: "CompileAhead", changed: asyncio.Event, console: Console
) -> None:
    """Starts the engine and waits until its programs have run once. Raises the error that ended it."""
    with console.task("compiling", always=True) as report:
        state.engine.start(changed.set, report, ahead)
        await changed.wait()
    if state.engine.error:
        await asyncio.to_thread(ahead.stop)
        raise state.engine.error

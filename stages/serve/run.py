"""Runs the server from its flags: binds the address, loads the model, then answers clients."""

import asyncio
import contextlib
import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from typing import Any

from engine.device import start_jax
from engine.errors import UserError
from stages.cli import signals
from stages.cli.console import Console
from stages.serve import server
from stages.serve.api.guard import HOST, LOCAL_HOSTS
from stages.serve.flags import ServeFlags


@contextlib.contextmanager
def _quick_threads() -> Iterator[None]:
    """Within the block, threads take turns sooner, for weights are read beside compilation. What they made then stays:
    garbage is looked for among the objects of requests alone."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.freeze()
        gc.set_threshold(2_000)  # as Python has it


def run(flags: ServeFlags) -> int:
    """Serves until a signal; returns what `lifecycle.serve` does. Raises UserError."""
    keys = _split(flags.api_key) or _split(os.environ.get("THRICE_API_KEY"))
    local = server.is_local(flags.host)
    if not keys and not local:
        raise UserError(
            f"{flags.host} can be reached by others: give --api-key (or THRICE_API_KEY), or listen on 127.0.0.1 alone."
        )
    hosts = None  # any, where a key protects it
    if local or flags.allow_host:
        proxies = [name[1] for origin in flags.allow_origin if (name := HOST.fullmatch(origin.partition("://")[2]))]
        hosts = LOCAL_HOSTS | {host.lower() for host in (*_split(flags.allow_host), *proxies, flags.host)}
    with server.bind(flags.host, flags.port) as sock, Console() as console:
        address, port = sock.getsockname()[:2]
        signals.set_phase("before it was ready.")
        with _quick_threads():
            device = start_jax(flags.device, one_arena=False)
            # Imports of JAX come after its start.
            import jax

            from engine.inference.config import EngineConfig, default_weights
            from engine.mesh.layout import make_inference_mesh
            from stages.serve.api.app import make_app
            from stages.serve.lifecycle import serve
            from stages.serve.state import load_state

            weights: Any = flags.weights or default_weights(device.backend)
            kv_dtype: Any = flags.keys_values
            prefix_cache_bytes = None if flags.prefix_cache is None else flags.prefix_cache * 10**6
            engine_config = EngineConfig(
                flags.slots, flags.capacity, weights, kv_dtype, prefix_cache_bytes, not flags.no_speculative_decoding
            )
            with jax.set_mesh(make_inference_mesh(flags.mesh)):
                state, ahead = load_state(
                    flags.model, engine_config, device, console, adapter=flags.adapter, template=flags.template,
                    name=flags.name, queue=flags.queue, price=flags.price, sampling=flags.sampling.overrides,
                )  # fmt: skip
        if hosts is not None:
            hosts |= {f"[{address}]" if ":" in address else address}
        app = make_app(state, keys, hosts, frozenset(flags.allow_origin), importlib.metadata.version("thrice"), flags.log)
        try:
            return asyncio.run(serve(state, app, sock, console, ahead, _ready(flags.host, port, len(keys))))
        finally:
            state.tokenizer.close()


def _ready(host: str, port: int, keys: int) -> str:
    host = f"[{host}]" if ":" in host else host
    url = f"http://{'localhost' if host in ('0.0.0.0', '[::]') else host}:{port}"
    locked = f"; {keys} API key{'s' * (keys != 1)}, one of which every request needs" if keys else ""
    return f"{locked}\n\npage    {url}\nclients {url}/v1\n\nCtrl-C ends it."


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]

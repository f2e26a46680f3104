"""`vllm-router` in a process of its own, before servers on this machine. Skips the test where it is not installed."""

import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import httpx
import pytest

from tests.serve.tiny_server import PATIENCE, until


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextlib.contextmanager
def vllm_router(urls: Sequence[str]) -> Iterator[str]:
    """Gives the address of a router before the servers. Each request goes to the server that the one before did not go to."""
    pytest.importorskip("vllm_router", reason="tests/clients/requirements.txt is not installed")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    words += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    # A server that comes again is asked again soon.
    words += ["--cb-timeout-duration-secs", "1", "--health-check-interval-secs", "1"]
    words += ["--worker-urls", *urls]

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        except httpx.HTTPError:
            return False

    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "vllm_router.launch_router", *words]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            is_ready = until(is_up)
            log.seek(0)
            assert is_ready, log.read()
            yield url
        finally:
            process.terminate()
            process.wait(60)

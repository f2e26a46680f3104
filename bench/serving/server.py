"""Runs `stages.serve` as a process: starts it on a free port, waits for it, ends it."""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from bench.serving.client import HOST, Client
from engine.counting.hardware import clock
from engine.errors import UserError

START_SECONDS = 300.0  # for a first start, compiling included


class Server:
    """Runs `python -m stages.serve` with `flags`, all its programs compiled when the block begins
    and gone when it ends.

    `ready_seconds`: from its start until /health says that it is ready. Raises UserError, with the
    end of the server's output, when it does not get so far.
    """

    def __init__(self, model: str, flags: Sequence[str] = ()) -> None:
        with socket.create_server((HOST, 0)) as probe:  # finds a free port
            self.port: int = probe.getsockname()[1]
        self.client = Client(self.port)
        self.ready_seconds = 0.0
        self.command = [
            sys.executable,
            "-m",
            "stages.serve",
            "--model",
            model,
            "--port",
            str(self.port),
            *flags,
        ]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115

    async def __aenter__(self) -> Self:
        begin = clock()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output
        )
        try:
            while True:
                reply = await self.client.get("/health", timeout=5)
                if reply.status == 200:
                    self.ready_seconds = clock() - begin
                    return self
                ended = self.process.poll()
                late = clock() - begin > START_SECONDS
                if late or ended is not None:
                    if ended is None:
                        why = f"had not compiled its programs after {START_SECONDS:.0f} s"
                    else:
                        why = f"ended with {ended}"
                    raise UserError(f"stages.serve {why}: {self.output()[-600:]}")
                await asyncio.sleep(0.02)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            if await self.wait(15) is None:
                self.process.kill()
                self.process.wait()
        self._output.close()

    def output(self) -> str:
        # A seek would move where the process writes.
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace").strip()

    async def wait(self, timeout: float) -> int | None:
        """Waits at most `timeout` seconds for its end; returns its exit code, None while it runs."""
        end = clock() + timeout
        while self.process.poll() is None and clock() < end:
            await asyncio.sleep(0.005)
        return self.process.poll()

    async def model(self) -> dict[str, Any]:
        return (await self.client.get("/v1/models")).json()["data"][0]

    def resident_bytes(self) -> int:
        """Returns the process's bytes of memory now; 0 where there is no /proc."""
        statm = Path(f"/proc/{self.process.pid}/statm")
        if statm.exists():
            return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

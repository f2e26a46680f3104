"""A line between a browser and a server that can be held, and can break."""

import contextlib
import socket
import threading
import time
from typing import Self


class Line:
    """Listens on a port of its own and carries bytes to and from `port`, replies in pieces of 200 bytes.

    A tiny model answers too fast to be stopped: from `hold` to `release` replies go on only until as many server-sent events
    have begun as `let_through` was told.
    """

    def __init__(self, port: int) -> None:
        self._held = False
        self._events = 0  # that may begin
        self._port = port
        self._cut = False
        self._ends: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._door.getsockname()[1]}/"
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._door.close()

    def hold(self) -> None:
        self._held, self._events = True, 0

    def let_through(self, events: int) -> None:
        self._events += events

    def release(self) -> None:
        self._held = False

    def cut(self) -> None:
        """Breaks everything that is under way, and whatever is begun until `mend`."""
        self._cut = True
        while self._ends:
            with contextlib.suppress(OSError):
                self._ends.pop().shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._cut = self._held = False

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._door.accept()
                if self._cut:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends += near, far
                threading.Thread(target=self._carry, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._carry, args=(far, near, True), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, reply: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(200 if reply else 65536):
                while reply and self._held and self._events <= 0:
                    time.sleep(0.01)
                self._events -= piece.count(b"data: ") * reply
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

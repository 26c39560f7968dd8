"""A TCP proxy on loopback whose speed can be changed: a slow link where the kernel has no netem."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_PIECE = 0.05  # seconds
_MOST = 65536


class SlowLink:
    """Passes connections on.

    Args:
        target: port of 127.0.0.1 that they go to.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self.bytes_per_second = float("inf")
        self.passed = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *given: socket.socket) -> threading.Thread:
        thread = threading.Thread(target=work, args=given, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        """One connection, until both directions have ended."""
        with near, suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as far:
            self._open |= {near, far}
            back = self._start(self._pass, far, near)
            self._pass(near, far)
            back.join()
            self._open -= {near, far}

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(self._most()):
                other.sendall(data)
                self.passed += len(data)
                time.sleep(len(data) / self.bytes_per_second)
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def _most(self) -> int:
        return max(1, int(min(_MOST, self.bytes_per_second * _PIECE)))

    def close(self) -> None:
        """Take no more connections, and end those that are there."""
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join(10)


@contextmanager
def slow_link(target: int) -> Iterator[SlowLink]:
    """A link to a port of this machine."""
    link = SlowLink(target)
    try:
        yield link
    finally:
        link.close()

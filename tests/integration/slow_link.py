"""A TCP proxy on loopback whose speed can be changed: a slow link where the kernel has no netem."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(min(_MOST, max(1, int(self._most())))):
                other.sendall(data)
                self.passed += len(data)
                if self.bytes_per_second != float("inf"):
                    time.sleep(len(data) / self.bytes_per_second)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            one.close()
            other.close()

    def _most(self) -> float:
        return min(_MOST, self.bytes_per_second * _PIECE)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


@contextmanager
def slow_link(target: int) -> Iterator[SlowLink]:
    """A link to a port of this machine."""
    link = SlowLink(target)
    try:
        yield link
    finally:
        link.close()

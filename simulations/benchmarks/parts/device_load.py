"""Clients of a device in a process of their own: they ask all the time, and note what came back and when.

    python simulations/benchmarks/parts/device_load.py URL [--clients N] [--rows N]

Each client has a connection of its own and asks for one row after another. It ends when a line (or the end) comes on
standard input; then the last line of its output is one JSON object: of each request ``[client, row, begin, end, slot,
scores]``, or the error. It imports nothing of this library, so that it can ask any server that speaks to a
`Transport`; ``socket://HOST:PORT`` is a line of JSON for each request and each answer, ``http://HOST:PORT`` a server of
``fedpeft serve`` that is asked to classify the text "row N".
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from typing import Any, Protocol
from urllib.parse import urlsplit

__all__ = ["HttpTransport", "SocketTransport", "Transport", "connect", "main"]


class Transport(Protocol):
    """How one client asks; another server needs another one, and nothing else."""

    def ask(self, row: int) -> tuple[str, list[float]]:
        """Ask for a row by its number: which slot answered, and the scores."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class SocketTransport:
    """A line of JSON each way.

    Args:
        host: of the server.
        port: of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rwb")

    def ask(self, row: int) -> tuple[str, list[float]]:
        """Ask for a row."""
        self._lines.write(json.dumps({"row": row}).encode() + b"\n")
        self._lines.flush()
        answer = json.loads(self._lines.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return str(answer["slot"]), list(answer["scores"])

    def close(self) -> None:
        """End the connection."""
        self._lines.close()
        self._socket.close()


class HttpTransport:
    """``/classify`` of a server, over one connection that is kept.

    Args:
        host: of the server.
        port: of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self._connection = HTTPConnection(host, port, timeout=60)

    def ask(self, row: int) -> tuple[str, list[float]]:
        """Ask for a row."""
        body, headers = json.dumps({"input": f"row {row}"}), {"content-type": "application/json"}
        self._connection.request("POST", "/classify", body, headers)
        response = self._connection.getresponse()
        told = response.read()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}")
        return str(response.headers["x-fedpeft-slot"]), list(json.loads(told)["data"][0]["probs"])

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


_TRANSPORTS: dict[str, Callable[[str, int], Transport]] = {"socket": SocketTransport, "http": HttpTransport}


def connect(url: str) -> Transport:
    """A transport for a server.

    Raises:
        SystemExit: for a URL of another kind.
    """
    parts = urlsplit(url)
    if parts.scheme not in _TRANSPORTS or parts.hostname is None or parts.port is None:
        raise SystemExit(f"{url!r} cannot be asked; expected socket://HOST:PORT or http://HOST:PORT")
    return _TRANSPORTS[parts.scheme](parts.hostname, parts.port)


def ask_all_the_time(url: str, client: int, rows: int, stop: threading.Event, notes: list[Any]) -> None:
    """One client: asks, notes, asks again."""
    transport = connect(url)
    number = client
    while not stop.is_set():
        row, begin = number % rows, time.perf_counter()
        try:
            slot, scores = transport.ask(row)
        except (OSError, HTTPException, RuntimeError, ValueError) as error:
            notes.append([client, row, begin, time.perf_counter(), None, str(error)])
        else:
            notes.append([client, row, begin, time.perf_counter(), slot, scores])
        number += 1
    transport.close()


def main() -> None:
    """Ask until told to end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="how many rows the server knows")
    options = parser.parse_args()
    stop, notes = threading.Event(), []  # type: ignore[var-annotated]
    clients = [
        threading.Thread(target=ask_all_the_time, args=(options.url, number, options.rows, stop, notes))
        for number in range(options.clients)
    ]
    for one in clients:
        one.start()
    sys.stdin.readline()
    stop.set()
    for one in clients:
        one.join()
    print(json.dumps(notes))


if __name__ == "__main__":
    main()

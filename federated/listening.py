"""HTTP connections that cannot be held for nothing: uvicorn's protocol with bounds on what one peer costs.

uvicorn bounds how many connections there are; whoever opens as many and says nothing shuts everybody out. Here a head
must come in time, an answer must be taken in time, and one address has but a part of the connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Bounds", "BoundedServer", "network_of"]

_LOG = logging.getLogger(__name__)
_LARGEST_NETWORK = 64  # bits: whoever has one IPv6 address has a whole network of this size
_MOST_TOLD = 100


def network_of(address: str) -> str:
    """What stands for one peer: its IPv4 address, or the network of its IPv6 address; other texts as they are."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((int(found), _LARGEST_NETWORK), strict=False))
    return str(found)


@dataclass(frozen=True)
class Bounds:
    """What a connection may cost.

    Args:
        head_seconds: until a request's head is there, on a new connection or after its first byte.
        answer_seconds: for which a client may take nothing of an answer.
        each: connections of one address; 0: as many as there are. Loopback has no such bound: a proxy may stand there.
    """

    head_seconds: float
    answer_seconds: float
    each: int = 0
    _peers: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def protocol(self) -> Any:
        """For uvicorn's ``http``."""
        return partial(_Bounded, bounds=self)

    def enter(self, address: str) -> bool:
        """Count a connection.

        Returns:
            Whether its address may have it.
        """
        peer = network_of(address)
        self._peers[peer] += 1
        if not self.each or self._peers[peer] <= self.each or _is_loopback(address):
            return True
        if peer not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(peer)
            _LOG.warning("%s has %d connections, and gets no more: all that one address may have", peer, self.each)
        return False

    def leave(self, address: str) -> None:
        """Count it no more."""
        peer = network_of(address)
        self._peers[peer] -= 1
        if not self._peers[peer]:
            del self._peers[peer]


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return not address  # a Unix socket
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


class BoundedServer(uvicorn.Server):
    """uvicorn's server, which gives a TLS handshake no more time than a head: before it a connection is not counted.

    Args:
        config: uvicorn's.
        bounds: of its connections.
    """

    def __init__(self, config: uvicorn.Config, bounds: Bounds) -> None:
        super().__init__(config)
        self._bounds = bounds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        loop: Any = asyncio.get_running_loop()
        if self.config.ssl is not None:
            loop.create_server = partial(loop.create_server, ssl_handshake_timeout=self._bounds.head_seconds)
        await super().startup(sockets)


class _Bounded(H11Protocol):
    """Logs no requests: their paths may hold anything. h11 bounds the size of a request's head, this its time."""

    def __init__(self, *args: Any, bounds: Bounds, **more: Any) -> None:
        super().__init__(*args, **more)
        self.access_log = False  # the configuration's own switch counts only while nobody listens to the root logger
        self._bounds = bounds
        self._peer = ""
        self._late: asyncio.TimerHandle | None = None
        self._full: asyncio.TimerHandle | None = None
        self._gone: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The time for the first head begins."""
        super().connection_made(transport)
        self._peer = self.client[0] if self.client else ""
        if not self._bounds.enter(self._peer):
            transport.abort()
        self._mind_the_head()

    def data_received(self, data: bytes) -> None:
        """A head has come whole, or goes on, or the next one has begun."""
        super().data_received(data)
        self._mind_the_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """No time runs any more."""
        self._bounds.leave(self._peer)
        self._forget_the_head()
        if self._gone is not None:
            self._gone.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not take what is sent: its time begins."""
        super().pause_writing()
        self._full = self.loop.call_later(self._bounds.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It took some."""
        super().resume_writing()
        if self._full is not None:
            self._full.cancel()
            self._full = None

    def timeout_keep_alive_handler(self) -> None:
        """Uvicorn's pause between two requests is over."""
        super().timeout_keep_alive_handler()
        self._leave()

    def _mind_the_head(self) -> None:
        states = self.conn.our_state, self.conn.their_state
        if states[1] is not h11.IDLE and states != (h11.DONE, h11.SEND_BODY):  # the rest of what is answered already
            self._forget_the_head()
        elif self._late is None:
            self._late = self.loop.call_later(self._bounds.head_seconds, self._leave)

    def _leave(self) -> None:
        """Close; what of an answer is not taken by then is lost."""
        self.transport.close()
        if self._gone is None:
            self._gone = self.loop.call_later(self._bounds.answer_seconds, self.transport.abort)

    def _forget_the_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

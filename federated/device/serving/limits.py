"""How much a server takes at once: sizes, counts and times, each with a default that suits a small device."""

from __future__ import annotations

from dataclasses import dataclass, fields

from federated.errors import DeviceError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """What is more is refused with a clear error, before a model sees it.

    Args:
        head_seconds: until a request's head is there, on a new connection or after its first byte.
        body_bytes: of a request's body.
        body_seconds: until a request's body is there.
        inputs: texts or series in one request to classify or embed.
        max_tokens: most tokens that a request may ask for.
        chat_tokens: tokens of a chat's answer that names no number.
        stops: stop texts of one request.
        generations: answers that are written at the same time; more wait.
        batch_rows: rows that share a forward pass.
        waiting: requests of a kind that may wait; one more is refused with 429.
        wait_seconds: longest wait before work begins; then 503.
        request_seconds: longest work on one request; then 504. A client that takes nothing of an answer for as long is
            let go.
        connections: open connections; one more is answered 503.
        drain_seconds: what a stopping server gives to requests under way.

    Raises:
        DeviceError: for a limit that lets nothing through.
    """

    head_seconds: float = 10.0
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    inputs: int = 128
    max_tokens: int = 1024
    chat_tokens: int = 128
    stops: int = 4
    generations: int = 4
    batch_rows: int = 32
    waiting: int = 64
    wait_seconds: float = 30.0
    request_seconds: float = 120.0
    connections: int = 512
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise DeviceError(f"the limit {field.name} is {value}; expected more than 0")

"""What the device's parts say to each other: slots, routings, requests and answers. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from federated.errors import DeviceError
from federated.manifest import VersionManifest

__all__ = [
    "NULL",
    "Activation",
    "Answer",
    "Embedding",
    "Prompt",
    "Sampling",
    "Served",
    "Slot",
    "Stream",
    "Token",
]

NULL = "null"
"""Name of the null adapter's slot."""

Prompt = str | Sequence[Mapping[str, str]]
"""A text to go on with, or a chat: ``[{"role": ..., "content": ...}, ...]``."""


@dataclass(frozen=True)
class Slot:
    """One adapter, ready to answer; nothing in it ever changes.

    Args:
        digest: digest of the adapter's weights, ``"null"``, or of what was made of several adapters on the device.
        version_id: the version that it was installed as; ``"null"`` for the null adapter.
        label: short name for people (``"v3"``).
        manifest: the version's record; None for the null adapter and for what was made on the device.
        handle: the backend's model.
        nbytes: memory that it costs besides the base.
    """

    digest: str
    version_id: str
    label: str
    manifest: VersionManifest | None = field(repr=False, hash=False)
    handle: Any = field(repr=False, compare=False)
    nbytes: int = field(default=0, repr=False, compare=False)


@dataclass(frozen=True)
class Activation:
    """A change of the routing.

    Args:
        kind: what was asked: ``"activate"`` a version, ``"null"`` (activate the null adapter) or ``"rollback"``.
        digest: slot that answers from now on.
        previous: slot that answered until now.
        milliseconds: wall time that it took.
    """

    kind: Literal["activate", "null", "rollback"]
    digest: str
    previous: str
    milliseconds: float


@dataclass(frozen=True)
class Served:
    """Predictions, with the slot that made all of them."""

    slot: Slot
    predictions: Sequence[Any]


@dataclass(frozen=True)
class Answer:
    """One row's prediction, with the slot that made it."""

    slot: Slot
    prediction: Any


@dataclass(frozen=True)
class Embedding:
    """One text as a vector of length 1, and how many tokens it was."""

    vector: Sequence[float]
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to end.

    Args:
        max_tokens: most tokens to make, at least 1.
        temperature: 0 takes the likeliest token each time; else logits are divided by it.
        top_p: draw among the fewest likeliest tokens whose probabilities sum to at least this.
        stop: texts that end the answer; they are not part of it.
        seed: of the draws; None takes the operating system's. Equal seeds give equal answers on one machine.

    Raises:
        DeviceError: for values out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise DeviceError(f"max_tokens is {self.max_tokens}; expected at least 1")
        if not 0 <= self.temperature <= 100:
            raise DeviceError(f"temperature is {self.temperature}; expected 0 to 100")
        if not 0 < self.top_p <= 1:
            raise DeviceError(f"top_p is {self.top_p}; expected above 0, at most 1")
        if "" in self.stop:
            raise DeviceError("a stop text is empty; leave it out, or name a text")


@dataclass(frozen=True)
class Token:
    """One step of an answer.

    Args:
        token_id: in the tokenizer's vocabulary.
        text: what is certain of the answer from now on and was not before; may be empty, while a character or a stop
            text is incomplete, and holds what was kept back besides the token's own text then.
        logprob: natural logarithm of the token's probability by the model, before temperature and ``top_p``.
        finish_reason: None but for the last: ``"stop"`` (end token or stop text) or ``"length"``.
    """

    token_id: int
    text: str
    logprob: float
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class Stream:
    """An answer under way: how many tokens the prompt is, and the answer's tokens as they are made."""

    prompt_tokens: int
    tokens: Iterator[Token]

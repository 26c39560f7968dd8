"""Answers in OpenAI's and vLLM's shapes, each with the version that made it. Pure functions."""

from __future__ import annotations

import base64
import json
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from federated.device.records import Embedding, Slot, Token
from federated.device.serving.directory import Listed

__all__ = ["DONE", "Frame", "classified", "embedded", "event", "models", "version_headers"]

DONE = b"data: [DONE]\n\n"

Usage = Mapping[str, int]


def version_headers(slot: Slot) -> dict[str, str]:
    """Which version answered, and the slot that did."""
    return {"x-fedpeft-version": slot.version_id, "x-fedpeft-slot": slot.digest}


def event(record: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True)
class Frame:
    """What all parts of one answer share.

    Args:
        kind: of the endpoint.
        model: as it was asked for.
        slot: that answers.
        created: seconds since 1970.
        number: unique.
    """

    kind: Literal["completion", "chat"]
    model: str
    slot: Slot
    created: int
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, text: str, finish_reason: str | None, usage: Usage) -> dict[str, Any]:
        """The answer at once."""
        said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        return self._record("chat.completion", [self._choice(said, finish_reason)]) | {"usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        if self.kind == "completion":
            return []
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)]

    def part(self, token: Token) -> dict[str, Any]:
        """One token of a stream."""
        if self.kind == "completion":
            return self._chunk({"text": token.text}, token.finish_reason)
        return self._chunk({"delta": {"content": token.text} if token.text else {}}, token.finish_reason)

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The record of tokens at a stream's end."""
        return self._record("chat.completion.chunk", []) | {"usage": usage}

    def _chunk(self, said: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return self._record("chat.completion.chunk", [self._choice(said, finish_reason)])

    def _choice(self, said: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}

    def _record(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        chat = self.kind == "chat"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.number}",
            "object": kind if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.slot.version_id,
            "choices": choices,
        }


def classified(predictions: Sequence[Any], *, model: str, slot: Slot, created: int) -> dict[str, Any]:
    """Predictions as vLLM's ``/classify`` gives them, with the labels' names besides."""
    data = [
        {
            "index": index,
            "label": one.label,
            "probs": list(one.scores.values()),
            "labels": list(one.scores),
            "num_classes": len(one.scores),
        }
        for index, one in enumerate(predictions)
    ]
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": created,
        "model": model,
        "system_fingerprint": slot.version_id,
        "data": data,
    }


def embedded(made: Sequence[Embedding], *, model: str, slot: Slot, encoding: str) -> dict[str, Any]:
    """Vectors as OpenAI gives them."""
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(one.vector, encoding)}
        for index, one in enumerate(made)
    ]
    tokens = sum(one.tokens for one in made)
    return {
        "object": "list",
        "model": model,
        "system_fingerprint": slot.version_id,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(vector: Sequence[float], encoding: str) -> Any:
    if encoding == "float":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def models(listed: Sequence[Listed], *, created: int) -> dict[str, Any]:
    """What can be asked for; ``root`` is the version that answers at this moment, as in vLLM."""
    data = [
        {
            "id": one.name,
            "object": "model",
            "created": created,
            "owned_by": "fedpeft",
            "parent": one.parent,
            "root": one.slot.version_id if one.slot else None,
            "slot": one.slot.digest if one.slot else None,
            "label": one.slot.label if one.slot else None,
        }
        for one in listed
    ]
    return {"object": "list", "data": data}

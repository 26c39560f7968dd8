"""How a checked request becomes an answer: one slot from its first token to its last, and OpenAI's shapes around it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from federated.device.records import Prompt, Sampling
from federated.device.serving import shapes
from federated.device.serving.faults import ApiError, error_body
from federated.device.serving.schemas import ClassifyBody, EmbeddingBody, GenerationBody
from federated.device.serving.service import Service, Speaks
from federated.device.serving.shapes import Frame, Usage
from federated.device.serving.threads import while_connected
from federated.device.serving.writing import Answer
from federated.errors import DeviceError

__all__ = ["Call", "Desk"]

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Call:
    """What of a request to write is not in its body's common part.

    Args:
        kind: of the endpoint.
        prompt: a text, or messages.
        max_tokens: most tokens to write.
        arm: the experiment arm that the caller put the request in.
    """

    kind: Literal["completion", "chat"]
    prompt: Prompt
    max_tokens: int
    arm: str | None


class Desk:
    """Answers requests; see `federated.device.serving.application` for the endpoints.

    Args:
        service: does the work.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def write(self, request: Request, body: GenerationBody, call: Call) -> Response:
        """Write an answer, at once or as a stream.

        Raises:
            DeviceError: if it is refused.
            ClientGone: if nobody waits any more.
        """
        begin, service = time.perf_counter(), self._service
        self._needs("text")
        sampling = self._sampling(body, call.max_tokens)
        wanted = service.directory.wanted(body.model, user=body.user, arm=call.arm)
        answer = await while_connected(request, service.writer.begin(call.prompt, sampling, wanted))
        frame = Frame(call.kind, self._name(body.model), answer.slot, int(service.clock()))
        headers = shapes.version_headers(answer.slot)
        pieces = _Pieces(service, answer, begin)
        if body.stream:
            return _EventStream(pieces.events(frame, usage=body.include_usage), answer, headers)
        try:
            text, reason = await while_connected(request, pieces.whole())
        finally:
            await answer.close()
        return JSONResponse(frame.whole(text, reason, _usage(answer)), headers=headers)

    async def classify(self, request: Request, body: ClassifyBody, arm: str | None) -> Response:
        """Classify texts or series, all by one slot."""
        self._needs("labels")
        rows = self._counted(body.rows)
        wanted = self._service.directory.wanted(body.model, user=body.user, arm=arm)
        slot, made = await while_connected(request, self._service.classify(rows, wanted))
        created = int(self._service.clock())
        record = shapes.classified(made, model=self._name(body.model), slot=slot, created=created)
        return JSONResponse(record, headers=shapes.version_headers(slot))

    async def embed(self, request: Request, body: EmbeddingBody, arm: str | None) -> Response:
        """Embed texts, all by one slot."""
        texts = self._counted(list(body.texts))
        wanted = self._service.directory.wanted(body.model, user=body.user, arm=arm)
        slot, made = await while_connected(request, self._service.embed(texts, wanted))
        record = shapes.embedded(made, model=self._name(body.model), slot=slot, encoding=body.encoding_format)
        self._service.metrics.tokens(prompt=record["usage"]["prompt_tokens"], completion=0)
        return JSONResponse(record, headers=shapes.version_headers(slot))

    def _name(self, model: str | None) -> str:
        return self._service.directory.base_name if model is None else model

    def _needs(self, speaks: Speaks) -> None:
        found = self._service.speaks
        if found == speaks:
            return
        other = "it classifies: POST /classify" if found == "labels" else "it writes: POST /v1/completions"
        raise ApiError(f"this server's task does not do that, {other}", status=404, code="other_task")

    def _sampling(self, body: GenerationBody, max_tokens: int) -> Sampling:
        limits = self._service.limits
        if max_tokens > limits.max_tokens:
            raise ApiError(
                f"max_tokens is {max_tokens}, expected at most {limits.max_tokens} on this server", param="max_tokens"
            )
        if len(body.stops) > limits.stops:
            raise ApiError(f"{len(body.stops)} stop texts, expected at most {limits.stops}", param="stop")
        return Sampling(max_tokens, body.temperature, body.top_p, body.stops, body.seed)

    def _counted(self, given: list[_Item]) -> list[_Item]:
        most = self._service.limits.inputs
        if len(given) > most:
            raise ApiError(f"input has {len(given)} entries, expected at most {most} on this server", param="input")
        return given


class _Pieces:
    """One answer's tokens, as a text or as events."""

    def __init__(self, service: Service, answer: Answer, begin: float) -> None:
        self._service, self._answer, self._begin = service, answer, begin

    async def whole(self) -> tuple[str, str | None]:
        """The text, and why it ended."""
        text: list[str] = []
        async for token in self._answer.tokens():
            self._first(not text)
            text.append(token.text)
        return "".join(text), self._answer.generation.finish_reason

    async def events(self, frame: Frame, *, usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events; an answer that fails on its way ends with an error and without ``[DONE]``."""
        for record in frame.opening():
            yield shapes.event(record)
        begun = False
        try:
            async for token in self._answer.tokens():
                self._first(not begun)
                begun = True
                if token.text or token.finish_reason:
                    yield shapes.event(frame.part(token))
        except DeviceError as error:
            yield shapes.event(error.body if isinstance(error, ApiError) else error_body(str(error), 400))
            return
        if usage:
            yield shapes.event(frame.closing(_usage(self._answer)))
        yield shapes.DONE

    def _first(self, first: bool) -> None:
        if first:
            self._service.metrics.first_token(time.perf_counter() - self._begin)


class _EventStream(StreamingResponse):
    """Gives pin and place back however the stream ends, also when it never began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], answer: Answer, headers: dict[str, str]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.close()


def _usage(answer: Answer) -> Usage:
    prompt, completion = answer.generation.prompt_tokens, answer.generation.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

"""The endpoints for whoever asks: OpenAI's, and vLLM's to classify. Nothing here changes which adapter answers.

What is done with a request is in `federated.device.serving.desk`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response

from federated.device.serving import shapes
from federated.device.serving.desk import Call, Desk
from federated.device.serving.handlers import add_handlers
from federated.device.serving.metrics import CONTENT_TYPE
from federated.device.serving.schemas import ChatBody, ClassifyBody, CompletionBody, EmbeddingBody
from federated.device.serving.service import Service

__all__ = ["PATHS", "bare_app", "make_app", "observing"]

PATHS = (
    "/healthz",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/classify",
    "/classify",
)

Arm = Annotated[str | None, Header(alias="x-fedpeft-arm", max_length=200)]


def bare_app() -> FastAPI:
    """No endpoints, and one shape for all errors."""
    app = FastAPI(title="fedpeft serve", openapi_url=None, docs_url=None, redoc_url=None)
    add_handlers(app)
    return app


def make_app(service: Service) -> FastAPI:
    """The application for whoever asks."""
    app = bare_app()
    app.include_router(observing(service))
    app.include_router(_asking(service))
    return app


def observing(service: Service) -> APIRouter:
    """``/healthz``, ``/metrics`` and ``/v1/models``."""
    router = APIRouter()

    @router.get("/healthz")
    async def health() -> JSONResponse:
        """Alive, ready, stale."""
        ready, stale = service.state.ready, service.control.stale
        status = "stopping" if not ready else "stale" if stale else "ok"
        record = {"status": status, "alive": True, "ready": ready, "stale": stale is not None, "reason": stale}
        return JSONResponse(record, 200 if ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' numbers."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What can be asked for."""
        return shapes.models(service.directory.listed(), created=service.started)

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        found = [one for one in service.directory.listed() if one.name == name]
        if not found:
            raise service.directory.unknown(name)
        record: dict[str, Any] = shapes.models(found, created=service.started)["data"][0]
        return record

    return router


def _asking(service: Service) -> APIRouter:
    router, desk = APIRouter(), Desk(service)

    @router.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody, arm: Arm = None) -> Response:
        return await desk.write(request, body, Call("completion", body.text, body.max_tokens or 16, arm))

    @router.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody, arm: Arm = None) -> Response:
        most = body.max_completion_tokens or body.max_tokens or service.limits.chat_tokens
        return await desk.write(request, body, Call("chat", [one.plain() for one in body.messages], most, arm))

    @router.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingBody, arm: Arm = None) -> Response:
        return await desk.embed(request, body, arm)

    @router.post("/v1/classify")
    @router.post("/classify")
    async def classify(request: Request, body: ClassifyBody, arm: Arm = None) -> Response:
        return await desk.classify(request, body, arm)

    return router

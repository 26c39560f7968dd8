"""The endpoints that change which adapter answers; on a listener of their own, with a token of its own.

``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter`` take vLLM's fields; ``lora_path`` is a version's name.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from federated.device.records import Activation, Slot
from federated.device.serving.application import bare_app, observing
from federated.device.serving.faults import error_body
from federated.device.serving.schemas import ActivateBody, LoadBody, RouteBody, UnloadBody
from federated.device.serving.service import Service
from federated.errors import FederatedError, ModelError, RegistryError, VersionNotFound, WireError

__all__ = ["ADMIN_PATHS", "make_admin_app"]

ADMIN_PATHS = (
    "/healthz",
    "/metrics",
    "/v1/models",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/admin/activate",
    "/admin/rollback",
    "/admin/route",
    "/admin/follow",
    "/admin/status",
)


def make_admin_app(service: Service) -> FastAPI:
    """The application for whoever runs the server."""
    app = bare_app()
    _add_handlers(app)
    app.include_router(observing(service))
    app.include_router(_adapters(service))
    app.include_router(_routing(service))
    return app


def _add_handlers(app: FastAPI) -> None:
    """An administrator may read what the store and the runtime say."""

    @app.exception_handler(RegistryError)
    @app.exception_handler(ModelError)
    @app.exception_handler(WireError)
    async def refused(_: Request, error: FederatedError) -> Response:
        status = 404 if isinstance(error, VersionNotFound) else 409
        return JSONResponse(error_body(str(error), status), status)


def _adapters(service: Service) -> APIRouter:
    router, control = APIRouter(), service.control

    @router.post("/v1/load_lora_adapter")
    async def load(body: LoadBody) -> dict[str, Any]:
        slot = await service.in_thread(lambda: control.load(body.lora_name, body.lora_path, replace=body.load_inplace))
        return {"lora_name": body.lora_name, **_slot(slot)}

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadBody) -> dict[str, Any]:
        return {"lora_name": body.lora_name, "slot": await service.in_thread(lambda: control.unload(body.lora_name))}

    return router


def _routing(service: Service) -> APIRouter:
    router, control, runtime = APIRouter(), service.control, service.runtime

    @router.post("/admin/activate")
    async def activate(body: ActivateBody) -> dict[str, Any]:
        return _change(await service.in_thread(lambda: control.activate(body.model)))

    @router.post("/admin/rollback")
    async def rollback() -> dict[str, Any]:
        return _change(await service.in_thread(control.rollback))

    @router.post("/admin/follow")
    async def follow() -> dict[str, Any]:
        made = await service.in_thread(control.follow)
        return {"changed": False} if made is None else {"changed": True, **_change(made)}

    @router.post("/admin/route")
    async def route(body: RouteBody) -> dict[str, Any]:
        await service.in_thread(lambda: control.route(user=body.user, arm=body.arm, name=body.model))
        return {"users": dict(runtime.routes.users), "arms": dict(runtime.routes.arms)}

    @router.get("/admin/status")
    async def status() -> dict[str, Any]:
        routes = runtime.routes
        return {
            "active": _slot(runtime.active),
            "history": [_slot(slot) for slot in reversed(runtime.history)],
            "residents": [_slot(slot) for slot in runtime.slots],
            "pins": dict(runtime.pins),
            "bytes": runtime.nbytes,
            "names": dict(routes.names),
            "users": dict(routes.users),
            "arms": dict(routes.arms),
            "swaps": runtime.swaps,
            "channel": control.channel,
            "stale": control.stale,
        }

    return router


def _slot(slot: Slot) -> dict[str, Any]:
    return {"slot": slot.digest, "version": slot.version_id, "label": slot.label}


def _change(made: Activation) -> dict[str, Any]:
    return {"kind": made.kind, "slot": made.digest, "previous": made.previous, "milliseconds": made.milliseconds}

"""One shape for all errors of an application: this library's own messages, and nobody else's."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from federated.device.serving.faults import FAILED, ApiError, error_body, invalid
from federated.device.serving.threads import ClientGone
from federated.errors import DataError, DeviceError, ModelError, UnknownAdapter

__all__ = ["add_handlers"]


def add_handlers(app: FastAPI) -> None:
    """Answer errors of the application's endpoints.

    Of what is not listed here the guard logs the place; the caller is told a number to look it up by.
    """

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        """Refused on purpose."""
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(DataError)
    @app.exception_handler(DeviceError)
    @app.exception_handler(ModelError)
    async def not_possible(_: Request, error: Exception) -> Response:
        """Refused by the runtime or the task."""
        return JSONResponse(error_body(str(error), 400), 400)

    @app.exception_handler(UnknownAdapter)
    async def nowhere(_: Request, error: Exception) -> Response:
        """A name that was taken away since the request came."""
        return JSONResponse(error_body(str(error), 404, code="model_not_found", param="model"), 404)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        """A body of another shape."""
        return JSONResponse(invalid(error.errors()).body, 400)

    @app.exception_handler(HTTPException)
    async def no_such_endpoint(_: Request, error: HTTPException) -> Response:
        """Nothing is there."""
        told = {404: "no such endpoint", 405: "another method is needed here"}.get(error.status_code, "refused")
        return JSONResponse(error_body(told, error.status_code), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        """Unforeseen."""
        return JSONResponse(error_body(FAILED, 500), 500)  # starlette raises it again, for the guard

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> Response:
        """The client left."""
        return Response(status_code=499)  # nobody reads it

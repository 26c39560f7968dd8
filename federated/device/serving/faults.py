"""What a request is told when it is refused: one error, in the shape that OpenAI's clients read.

Only messages of this library leave the server. What any other exception says may quote inputs, paths or addresses: the
caller gets a request's number instead, the log the place in the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from federated.errors import DeviceError

__all__ = ["FAILED", "ApiError", "busy", "error_body", "invalid", "unknown_model"]

FAILED = "the server failed on this request; its log says where, under this response's x-request-id"

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(DeviceError):
    """A request that is refused.

    Args:
        message: what was found, what was expected and what to do; goes to the caller as it is.
        status: of the response.
        code: a short stable word for programs.
        param: field of the request that it is about.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the response besides its body."""
        told = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return told | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error record."""
        return error_body(str(self), self.status, code=self.code, param=self.param)


def error_body(message: str, status: int, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error record."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def busy(what: str, *, status: int, retry_after: int) -> ApiError:
    """Refused now, welcome later."""
    code = "queue_full" if status == 429 else "overloaded"
    return ApiError(f"{what}; try again in {retry_after} s", status=status, code=code, retry_after=retry_after)


def unknown_model(model: str, known: Sequence[str]) -> ApiError:
    """A model's name that leads nowhere: answering with another adapter would look like success."""
    found = ", ".join([*known[:10], *(["..."] if len(known) > 10 else [])])
    return ApiError(
        f"no model {model[:160]!r} on this device, found {found}: GET /v1/models lists what can be asked",
        status=404,
        code="model_not_found",
        param="model",
    )


def invalid(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a request's body, without quoting what was sent.

    Args:
        errors: pydantic's or FastAPI's records, each with ``loc``, ``msg`` and ``type``.
    """
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return ApiError("the body is not valid JSON; expected one JSON object", code="invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    if not where and first["type"] == "value_error":
        return ApiError(message, code="invalid_value")
    if not where:
        return ApiError(
            "the body is not a JSON object; expected one, with the header content-type: application/json",
            code="invalid_body",
        )
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError(f"{where}: {message}{more}", code="invalid_value", param=where.split(".")[0])

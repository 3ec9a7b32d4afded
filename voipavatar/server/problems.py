"""What is answered when something is wrong: a status and one sentence, never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..errors import CapacityError, InputError, StageError, TransportError, VoipAvatarError

logger = logging.getLogger(__name__)


def _problem(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers=dict(headers) if headers else None)


async def _on_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        _unexpected(error)
    sentence = str(error.detail)
    if error.status_code == 404 and sentence == "Not Found":
        sentence = f"there is nothing at {request.url.path[:100]}; /docs lists what there is"
    elif error.status_code == 405:
        sentence = f"{request.method} can't be done here; /docs lists what can"
    return _problem(error.status_code, sentence, error.headers)


async def _on_invalid(_: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        _unexpected(error)
    if any(one["type"] in ("json_invalid", "json_type") for one in error.errors()):
        return _problem(400, "the body is not JSON: send an object such as {}")
    told = []
    for one in error.errors()[:5]:
        place = ".".join(str(part) for part in one["loc"] if part not in ("body", "query", "path"))
        what = str(one["msg"])[:1].lower() + str(one["msg"])[1:]
        told.append(f"{place}: {what}" if place else what)
    return _problem(422, "; ".join(told))


async def _on_ours(request: Request, error: Exception) -> Response:
    headers: dict[str, str] = {}
    match error:
        case InputError():
            status = 422
        case CapacityError():
            status, headers = 503, {"Retry-After": "10"}
        case StageError():
            status = 409
        case TransportError(retryable=True):
            status, headers = 503, {"Retry-After": "3"}
        case TransportError():
            status = 502
        case _:
            status = 500
    if status >= 500 and not isinstance(error, CapacityError):
        logger.error("a request failed", exc_info=error, extra={"path": request.url.path})
    return _problem(status, str(error), headers)


async def _on_gone(_: Request, error: Exception) -> Response:
    return _problem(400, "the request was broken off before its end")


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error, extra={"path": request.url.path})
    return _problem(500, "something went wrong inside the server; its log has the details")


def _unexpected(error: Exception) -> NoReturn:
    raise error


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    HTTPException: _on_http,
    RequestValidationError: _on_invalid,
    VoipAvatarError: _on_ours,
    ClientDisconnect: _on_gone,
    Exception: _on_bug,
}
"""What FastAPI calls for what was raised."""

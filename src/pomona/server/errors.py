"""One table: exception -> HTTP status and OpenAI's error body. No other module knows status codes of errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pomona.core import errors as core


class BodyError(core.PomonaError):
    """The request body is not what a JSON API takes: not UTF-8, not JSON, not an object."""


class BodyTooLargeError(core.PomonaError):
    """The request body exceeds the limit."""


class RangeError(core.PomonaError):
    """Nothing of a file is in the range that was asked for.

    Args:
        num_bytes: of the file.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"Range: the file has {num_bytes} bytes: nothing of it is in that range.")
        self.num_bytes = num_bytes


class AuthenticationError(core.PomonaError):
    """No API key, or a wrong one."""


class NoSuchRouteError(core.PomonaError):
    """There is nothing at that path."""


class ForbiddenError(core.PomonaError):
    """The API key is right, but not for this."""


class RequestFailedError(core.PomonaError):
    """The engine accepted the request and then could not carry it out: our fault."""


class RequestAbortedError(core.PomonaError):
    """An operator ended the request."""


class AdapterNameError(core.InvalidRequestError):
    """An adapter's name is malformed or taken by the base model."""


class UnknownAdapterError(core.PomonaError):
    """No adapter of that name is loaded."""


@dataclass(frozen=True, slots=True)
class _Row:
    status: int
    error_type: str
    code: str | None
    param: str | None = None
    retry_after_s: int | None = None
    is_final: bool = False
    """Clients are told not to try again, where they would by the status alone."""


_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"

# The first class found along an exception's own ancestry counts, so subclasses may stand anywhere.
_TABLE: Final[Mapping[type[BaseException], _Row]] = {
    core.InvalidRequestError: _Row(400, _INVALID, "invalid_value"),
    core.PromptTooLongError: _Row(400, _INVALID, "context_length_exceeded"),
    core.ModelNotFoundError: _Row(404, _INVALID, "model_not_found", param="model"),
    core.QueueFullError: _Row(429, "rate_limit_error", "queue_full", retry_after_s=1),
    core.RateLimitError: _Row(429, "rate_limit_error", "rate_limit_exceeded"),
    core.QuotaExceededError: _Row(429, "insufficient_quota", "insufficient_quota", is_final=True),
    core.DeadlineError: _Row(429, "rate_limit_error", "deadline_unreachable"),
    core.DatabaseUnavailableError: _Row(503, _SERVER, "accounts_unavailable", retry_after_s=5),
    core.AccountNotFoundError: _Row(404, _INVALID, "not_found"),
    core.AccountConflictError: _Row(409, _INVALID, "conflict", is_final=True),
    core.EngineUnavailableError: _Row(503, _SERVER, "engine_unavailable", retry_after_s=5),
    # Sent again by itself, what killed the engine would use up the deaths that it is allowed.
    core.EngineDiedError: _Row(503, _SERVER, "engine_died", retry_after_s=5, is_final=True),
    core.AdapterError: _Row(422, _INVALID, "adapter_invalid", param="source"),
    core.AdapterNotFoundError: _Row(404, _INVALID, "adapter_source_not_found", param="source"),
    core.AdapterForbiddenError: _Row(403, _INVALID, "adapter_source_forbidden", param="source"),
    core.AdapterUnavailableError: _Row(503, _SERVER, "adapter_unavailable"),
    core.AdapterFailedError: _Row(409, _INVALID, "adapter_failed", param="model", is_final=True),
    core.AdapterConfigError: _Row(422, _INVALID, "adapter_config_invalid", param="source"),
    AdapterNameError: _Row(400, _INVALID, "invalid_value"),
    UnknownAdapterError: _Row(404, _INVALID, "adapter_not_found", param="name"),
    BodyError: _Row(400, _INVALID, "invalid_json"),
    BodyTooLargeError: _Row(413, _INVALID, "body_too_large"),
    RangeError: _Row(416, _INVALID, "invalid_range"),
    AuthenticationError: _Row(401, _INVALID, "invalid_api_key"),
    NoSuchRouteError: _Row(404, _INVALID, "not_found"),
    ForbiddenError: _Row(403, _INVALID, "insufficient_permissions"),
    RequestFailedError: _Row(500, _SERVER, "request_failed"),
    RequestAbortedError: _Row(503, _SERVER, "request_aborted", retry_after_s=1),
}
_INTERNAL: Final = _Row(500, _SERVER, "internal_error")
_OF_ACCOUNTS: Final = ("/v1/admin/", "/v1/usage", "/v1/shares", "/v1/files", "/v1/batches")
"""What a server without accounts does not have."""
_HTTP_CODES: Final = {404: "not_found", 405: "method_not_allowed"}


def _row_of(error: core.PomonaError) -> _Row:
    for kind in type(error).__mro__:
        if kind in _TABLE:
            return _TABLE[kind]
    return _INTERNAL


def error_body(error: core.PomonaError) -> bytes:
    """Return OpenAI's ``{"error": {...}}`` as JSON, for a response or an event of a stream."""
    row = _row_of(error)
    param = error.field if isinstance(error, core.InvalidRequestError) else row.param
    message = "The server failed." if row is _INTERNAL else str(error)
    return _encode(message, row.error_type, param, row.code)


def error_response(error: core.PomonaError) -> Response:
    """Return the whole HTTP answer for an error."""
    row = _row_of(error)
    retry_after_s = (
        error.retry_after_s
        if isinstance(error, core.RateLimitError | core.AdapterUnavailableError)
        else row.retry_after_s
    )
    headers = {} if retry_after_s is None else {"retry-after": str(math.ceil(retry_after_s))}
    if row.is_final or (isinstance(error, core.RateLimitError) and error.retry_after_s is None):
        headers["x-should-retry"] = "false"  # OpenAI's clients would ask again, twice
    if row.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, RangeError):
        headers["content-range"] = f"bytes */{error.num_bytes}"
    return Response(error_body(error), row.status, headers, "application/json")


def internal_error_response() -> Response:
    """Return the answer to a bug of ours; it tells nothing of the inside."""
    body = _encode("The server failed; the operator can find out why in its log.", _SERVER, None, "internal_error")
    return Response(body, 500, media_type="application/json")


async def handle_pomona_error(_: Request, error: Exception) -> Response:
    """Exception handler of the application for our own errors."""
    assert isinstance(error, core.PomonaError)
    return error_response(error)


async def handle_http_error(request: Request, error: Exception) -> Response:
    """Exception handler of the application for the framework's own 404 and 405."""
    assert isinstance(error, HTTPException)
    shown = request.url.path
    hint = ""
    if shown.startswith(_OF_ACCOUNTS) and request.app.state.context.accounts is None:
        hint = " It needs a server with accounts: pomona serve --accounts."
    message = {404: f"There is no {shown} here.{hint}", 405: f"{request.method} is not allowed on {shown}."}.get(
        error.status_code, str(error.detail)
    )
    body = _encode(message, _INVALID, None, _HTTP_CODES.get(error.status_code))
    return Response(body, error.status_code, error.headers, "application/json")


def _encode(message: str, error_type: str, param: str | None, code: str | None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": error_type, "param": param, "code": code}})

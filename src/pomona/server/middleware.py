"""What happens around every request: an id, a count, the API key, and an answer even when we have a bug."""

import hmac
import logging
import secrets
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pomona.server.errors import AuthenticationError, error_response, internal_error_response
from pomona.server.metrics import ServerMetrics

_LOGGER = logging.getLogger(__name__)
OPEN_PATHS: Final = frozenset({"/health", "/ready"})
"""Answered without a key: load balancers ask them, and they tell nothing of what is served."""
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CLIENT_GONE: Final = 499


class Boundary:
    """Outermost: gives each request its id, counts its answer, and survives our own bugs."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        request_id = state.setdefault("request_id", secrets.token_hex(16))  # a batch's line has its own
        state["send_body"] = send
        status = _CLIENT_GONE

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception:
            _LOGGER.exception("Request %s failed: this is a bug", request_id)
            self._metrics.internal_errors.inc()
            if status == _CLIENT_GONE:
                await internal_error_response()(scope, receive, send_on)
        finally:
            # Paths and methods are the client's words; labels must be few, so only known ones become labels.
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http_requests.labels(route, method, str(status)).inc()


class KeyCheck:
    """Asks for the API key, if there is one."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, space, key = HTTPConnection(scope).headers.get("authorization", "").partition(" ")
            given = f"{scheme.lower()}{space}{key}".encode()
            if not hmac.compare_digest(given, self._expected):
                what = "is wrong" if given else "is missing"
                error = AuthenticationError(f"The API key {what}: send it as 'Authorization: Bearer KEY'.")
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

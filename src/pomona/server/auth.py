"""Who may do what on a server with accounts: one table, everything else denied, and the middleware that asks it."""

import enum
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pomona.accounts.accounts import Accounts
from pomona.accounts.principal import Principal, Role
from pomona.core.errors import PomonaError
from pomona.server.errors import AuthenticationError, ForbiddenError, NoSuchRouteError, error_response
from pomona.server.middleware import OPEN_PATHS
from pomona.server.tenant import set_principal

TRUSTED_PRINCIPAL: Final = "pomona.principal"
"""Key of the ASGI scope under which this process itself, and nobody outside, says for whom it asks."""
_BEARER: Final = "bearer "
_MAX_KEY_CHARS: Final = 200


class Who(enum.Flag):
    """Kinds of keys."""

    TENANT = enum.auto()
    ADMIN = enum.auto()
    OPERATOR = enum.auto()
    AUDITOR = enum.auto()


_STAFF: Final = Who.ADMIN | Who.OPERATOR | Who.AUDITOR
_ANY: Final = _STAFF | Who.TENANT
_LOADERS: Final = Who.TENANT | Who.ADMIN | Who.OPERATOR
_READERS: Final = Who.TENANT | Who.ADMIN | Who.AUDITOR
_OF_ROLE: Final = {Role.ADMIN: Who.ADMIN, Role.OPERATOR: Who.OPERATOR, Role.AUDITOR: Who.AUDITOR}

RULES: Final[tuple[tuple[str, str, Who], ...]] = (
    ("POST", "/v1/chat/completions", Who.TENANT),
    ("POST", "/v1/completions", Who.TENANT),
    ("GET", "/v1/models", _ANY),
    ("GET", "/v1/models/", _ANY),
    ("POST", "/tokenize", _ANY),
    ("POST", "/detokenize", _ANY),
    ("GET", "/v1/adapters", _ANY),
    ("GET", "/v1/adapters/", _ANY),
    ("POST", "/v1/adapters", _LOADERS),
    ("DELETE", "/v1/adapters/", _LOADERS),
    ("PATCH", "/v1/adapters/", Who.ADMIN | Who.OPERATOR),
    ("PUT", "/v1/shares", _LOADERS),
    ("POST", "/v1/files", Who.TENANT),
    ("GET", "/v1/files", Who.TENANT),
    ("GET", "/v1/files/", Who.TENANT),
    ("DELETE", "/v1/files/", Who.TENANT),
    ("POST", "/v1/batches", Who.TENANT),
    ("GET", "/v1/batches", Who.TENANT),
    ("GET", "/v1/batches/", Who.TENANT),
    ("POST", "/v1/batches/", Who.TENANT),
    ("GET", "/v1/usage", _READERS),
    ("GET", "/metrics", _STAFF),
    ("GET", "/v1/admin/", _STAFF),
    ("POST", "/v1/admin/", Who.ADMIN),
    ("PUT", "/v1/admin/", Who.ADMIN),
    ("PATCH", "/v1/admin/", Who.ADMIN),
    ("DELETE", "/v1/admin/", Who.ADMIN),
    ("GET", "/openapi.json", _ANY),
    ("GET", "/docs", _ANY),
    ("GET", "/docs/oauth2-redirect", _ANY),
    ("GET", "/redoc", _ANY),
)
"""Method, path, and whose keys open it. A path that ends in a slash stands for all below it. The first row that fits
counts; what no row fits is answered as if it did not exist, so that a route without a row is closed, not open."""


def who_may(method: str, path: str) -> Who | None:
    """Return whose keys open a route; None if there is no row for it."""
    for row_method, row_path, who in RULES:
        if method == row_method and (path == row_path or (row_path.endswith("/") and path.startswith(row_path))):
            return who
    return None


def _kind_of(principal: Principal) -> Who:
    return Who.TENANT if principal.role is None else _OF_ROLE[principal.role]


def _wrong_kind(own: Who, needed: Who) -> str:
    own_kind, *kinds = (str(kind.name).lower() for kind in (own, *needed))
    command = "keys create TENANT" if Who.TENANT in needed else "keys admin --role ROLE"
    return f"This API key is of kind {own_kind}; this takes one of kind {' or '.join(kinds)} (pomona {command})."


class AccountCheck:
    """Lets a request in if its key is valid and opens the route; notes whose key it was.

    Args:
        app: behind the door.
        accounts: who is known.
    """

    def __init__(self, app: ASGIApp, accounts: Accounts) -> None:
        self._app = app
        self._accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        try:
            principal = scope.get(TRUSTED_PRINCIPAL) or await self._authenticate(connection)
            who = who_may(scope.get("method", ""), scope["path"])
            if who is None:
                raise NoSuchRouteError(f"There is no {scope['path'][:_MAX_KEY_CHARS]} here.")
            if not who & (own := _kind_of(principal)):
                raise ForbiddenError(_wrong_kind(own, who))
        except PomonaError as error:
            await error_response(error)(scope, receive, send)
            return
        set_principal(connection, principal)
        state = scope["state"]

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and "limit_headers" in state:
                MutableHeaders(scope=message).update(state["limit_headers"]())
            await send(message)

        await self._app(scope, receive, send_on)

    async def _authenticate(self, connection: HTTPConnection) -> Principal:
        given = connection.headers.get("authorization", "")
        if given[: len(_BEARER)].lower() != _BEARER:
            raise AuthenticationError("The API key is missing: send it as 'Authorization: Bearer KEY'.")
        principal = await self._accounts.authenticator.authenticate(given[len(_BEARER) :].strip()[:_MAX_KEY_CHARS])
        if principal is None:
            raise AuthenticationError("The API key is wrong: send it as 'Authorization: Bearer KEY'.")
        return principal

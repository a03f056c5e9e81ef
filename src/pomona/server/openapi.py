"""The OpenAPI document: wire types, examples and error answers of every route, made from the types themselves."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import pydantic
from pydantic.json_schema import models_json_schema

from pomona.server import account_types, protocol, responses

_REF: Final = "#/components/schemas/{}"
_REQUESTS: Final[tuple[type[pydantic.BaseModel], ...]] = (
    protocol.ChatCompletionRequest,
    protocol.CompletionRequest,
    protocol.AdapterLoadRequest,
    protocol.AdapterPinRequest,
    protocol.TokenizeRequest,
    protocol.DetokenizeRequest,
    account_types.TenantCreateRequest,
    account_types.TenantUpdateRequest,
    account_types.KeyCreateRequest,
    account_types.KeyRotateRequest,
    account_types.LimitsRequest,
    account_types.PriceRequest,
    account_types.ShareRequest,
    account_types.BatchCreateRequest,
)
_RESPONSES: Final[tuple[type[msgspec.Struct], ...]] = (
    responses.ChatCompletion,
    responses.Completion,
    responses.ModelList,
    responses.ModelCard,
    responses.AdapterList,
    responses.AdapterCard,
    responses.AdapterDeleted,
    responses.Tokenized,
    responses.Detokenized,
    responses.Health,
    responses.ErrorBody,
    account_types.TenantCard,
    account_types.TenantList,
    account_types.KeyCard,
    account_types.KeyList,
    account_types.LimitsCard,
    account_types.PriceCard,
    account_types.PriceList,
    account_types.ShareCard,
    account_types.UsageReport,
    account_types.FileCard,
    account_types.FileList,
    account_types.FileDeleted,
    account_types.BatchCard,
    account_types.BatchList,
)
_ERRORS: Final = {
    400: "A parameter is wrong; `error.param` names it. Also: malformed JSON, invalid UTF-8, prompt too long.",
    401: "The API key is missing or wrong.",
    403: "The API key is not for this; or the adapter's source lies outside what the operator allows.",
    404: "There is nothing of that name, as far as this API key can see.",
    409: "It exists already, or is in use. Of `model`: the adapter cannot be used; the message says why.",
    413: "The body is larger than the limit.",
    416: "Nothing of the file is in the range.",
    422: "The adapter cannot be used; the message says why. Nothing has changed.",
    429: "The queue is full or a limit is reached; nothing was admitted. Try again after `Retry-After` seconds.",
    500: "The server failed.",
    503: "The engine is not there, it may be restarting; or the accounts database is not.",
}


def schemas() -> dict[str, Any]:
    """Return the components of all wire types."""
    _, requests = models_json_schema([(kind, "validation") for kind in _REQUESTS], ref_template=_REF.format("{model}"))
    _, answers = msgspec.json.schema_components(_RESPONSES, ref_template=_REF.format("{name}"))
    return {**requests["$defs"], **answers}


def request_body(kind: type[pydantic.BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route that reads a body."""
    content = {"schema": {"$ref": _REF.format(kind.__name__)}, "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def path_parameter(name: str, description: str) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route with a name in its path; the name may hold slashes."""
    parameter = {"name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string"}}
    return {"parameters": [parameter]}


def query_parameters(meanings: Mapping[str, str]) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route with optional texts in its query: name -> meaning."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "description": meaning, "schema": {"type": "string"}}
            for name, meaning in meanings.items()
        ]
    }


def answers(kind: type[msgspec.Struct], *errors: int, is_stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of a route.

    Args:
        kind: of the 200 answer.
        *errors: statuses of errors, besides 401, 403, 500 and 503, which every route has.
        is_stream: the answer may be server-sent events instead.
    """
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF.format(kind.__name__)}}}
    if is_stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    found: dict[int | str, dict[str, Any]] = {200: {"description": (kind.__doc__ or "").strip(), "content": content}}
    error_schema = {"schema": {"$ref": _REF.format("ErrorBody")}}
    for status in sorted({401, 403, 500, 503, *errors}):
        found[status] = {"description": _ERRORS[status], "content": {"application/json": error_schema}}
    return found

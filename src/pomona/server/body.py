"""A request's body, from bytes on the wire to a checked wire type; everything that can be wrong with it is named."""

from typing import Any, TypeVar

import pydantic
import pydantic_core
from starlette.requests import ClientDisconnect, Request

from pomona.core.errors import InvalidRequestError
from pomona.server.errors import BodyError, BodyTooLargeError
from pomona.server.wire_fields import UNKNOWN_PARAMETER

_Model = TypeVar("_Model", bound=pydantic.BaseModel)

_DISCARD_FACTOR = 16
"""A body this many times the limit is read to its end (and dropped), so that its sender gets to see the 413."""
_MAX_VALUE_CHARS = 100
MAX_CONTAINERS = 100_000
"""Lists and objects in a body."""

_REASONS = {
    "missing": "is missing",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
    "too_short": "must not be empty",
}


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """Read the whole body, chunked or not, never keeping more than the limit.

    Raises:
        BodyTooLargeError: it is larger than ``max_body_bytes``.
    """
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= max_body_bytes:
                chunks.append(chunk)
            else:
                chunks.clear()
            if num_bytes > max_body_bytes * _DISCARD_FACTOR:
                break
    except ClientDisconnect as error:
        raise BodyError("The client went away before its request was complete.") from error
    if num_bytes > max_body_bytes:
        raise BodyTooLargeError(f"The request body is larger than the limit of {max_body_bytes} bytes.")
    return b"".join(chunks)


def has_too_many_containers(body: bytes) -> bool:
    """True if there are more than ``MAX_CONTAINERS`` lists and objects; brackets within texts are none."""
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return False
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside_texts = b"".join(without_escapes.split(b'"')[::2])
    return outside_texts.count(b"[") + outside_texts.count(b"{") > MAX_CONTAINERS


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``. Nesting is limited to 200 levels by the parser, width here: both because the
    event loop waits meanwhile.

    Raises:
        BodyError: it is not UTF-8, not JSON, or not an object.
    """
    if has_too_many_containers(body):
        raise BodyError(f"The request body has more than {MAX_CONTAINERS} lists and objects.")
    try:
        content = pydantic_core.from_json(body)
    except ValueError as error:
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as broken:
            raise BodyError(f"The request body is not valid UTF-8: {broken.reason} at byte {broken.start}.") from error
        raise BodyError(f"The request body is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise BodyError("The request body must be a JSON object.")
    return content


def validate(wire_type: type[_Model], content: dict[str, Any]) -> _Model:
    """Check a JSON object against a wire type.

    Raises:
        InvalidRequestError: names the first wrong field, its value and what it must be.
    """
    try:
        return wire_type.model_validate(content, strict=True)
    except pydantic.ValidationError as error:
        raise _invalid(error) from error


async def read_model(request: Request, wire_type: type[_Model], max_body_bytes: int) -> _Model:
    """Read, parse and check a request's body.

    Raises:
        BodyTooLargeError, BodyError, InvalidRequestError: as ``read_body``, ``parse_object`` and ``validate``.
    """
    return validate(wire_type, parse_object(await read_body(request, max_body_bytes)))


def _invalid(error: pydantic.ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False)[0]
    field = _field_name(first["loc"])
    kind = first["type"]
    if kind == UNKNOWN_PARAMETER:
        name = _field_name((*first["loc"], first["ctx"]["name"]))
        return InvalidRequestError(name, f"Unknown parameter: {name!r}.")
    if kind == "missing":
        return InvalidRequestError(field, f"{field} is missing")
    if kind == "too_long":
        num_entries, most = len(first["input"]), first["ctx"]["max_length"]
        return InvalidRequestError(field, f"{field} has {num_entries} entries: at most {most} are allowed")
    if kind == "value_error":
        return InvalidRequestError(field, f"{field} {first['ctx']['error']}")
    reason = _REASONS.get(kind) or first["msg"].replace("Input should be", "must be")
    return InvalidRequestError(field, f"{field} is {_cut(_shown(first['input']))}: {reason}")


def _field_name(loc: tuple[int | str, ...]) -> str:
    name = ""
    for part in loc:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return _cut(name)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "..."

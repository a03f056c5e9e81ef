"""Checked field types of request bodies: each names what is wrong in the client's own words.

Plain functions instead of unions, because a union's errors name its branches, not the value.
"""

import json
from collections.abc import Container, Mapping, Sized
from typing import Annotated, Any, Final, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError, core_schema

from pomona.core.errors import InvalidRequestError

_Sized = TypeVar("_Sized", bound=Sized)

MAX_PROMPTS: Final = 4096
"""Of one body, whatever the server's own limit on choices."""
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 1024
MAX_LISTED_TOKENS: Final = 1024
"""Most entries of ``logit_bias`` and of ``stop_token_ids``."""
MAX_METADATA_KEYS: Final = 16
UNKNOWN_PARAMETER: Final = "unknown_parameter"
"""Pydantic error type of ``refuse_unknown``; its context holds the ``name``."""
_MAX_TOKEN_ID: Final = 2**31 - 1


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _check_token_ids(field: str, value: list[Any]) -> tuple[int, ...]:
    # All at once first: a body may hold millions, and the event loop waits.
    if set(map(type, value)) <= {int} and min(value, default=0) >= 0 and max(value, default=0) <= _MAX_TOKEN_ID:
        return tuple(value)
    for position, token_id in enumerate(value):
        if not _is_int(token_id) or not 0 <= token_id <= _MAX_TOKEN_ID:
            shown = token_id if isinstance(token_id, int | float) else _kind(token_id)
            raise InvalidRequestError(field, f"{field}[{position}] is {shown}: must be a token id, 0 or larger")
    return tuple(value)


def _token_ids(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    field = str(info.field_name)
    if not isinstance(value, list):
        raise InvalidRequestError(field, f"{field} is {_kind(value)}: must be a list of token ids")
    return _check_token_ids(field, value)


def _stop_token_ids(value: Any, info: ValidationInfo) -> tuple[int, ...]:
    return () if value is None else _check_count(str(info.field_name), _token_ids(value, info))


def _check_count(field: str, entries: _Sized) -> _Sized:
    if len(entries) > MAX_LISTED_TOKENS:
        raise InvalidRequestError(field, f"{field} has {len(entries)} entries: at most {MAX_LISTED_TOKENS} are allowed")
    return entries


def _prompts(value: Any, info: ValidationInfo) -> tuple[str | tuple[int, ...], ...]:
    field = str(info.field_name)
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise InvalidRequestError(
            field, f"{field} is {_kind(value)}: must be a string, a list of strings, or token ids"
        )
    if not value:
        raise InvalidRequestError(field, f"{field} is an empty list: at least one prompt is needed")
    if isinstance(value[0], str | list) and len(value) > MAX_PROMPTS:
        raise InvalidRequestError(field, f"{field} has {len(value)} prompts: at most {MAX_PROMPTS} are allowed")
    if all(isinstance(part, str) for part in value):
        return tuple(value)
    if all(isinstance(part, list) for part in value):
        return tuple(_check_token_ids(f"{field}[{position}]", part) for position, part in enumerate(value))
    if _is_int(value[0]):
        return (_check_token_ids(field, value),)
    raise InvalidRequestError(
        field, f"{field} is a list of {_kind(value[0])} and others: must hold strings, token ids, or lists of token ids"
    )


def _stop_strings(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    field = str(info.field_name)
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequestError(field, f"{field} must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequestError(field, f"{field} has {len(stops)} strings: at most {MAX_STOP_STRINGS} are allowed")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequestError(
                field, f"{field} holds a string of {len(stop)} characters: must be 1 to {MAX_STOP_CHARS}"
            )
    return tuple(dict.fromkeys(stops))


def _logit_bias(value: Any, info: ValidationInfo) -> tuple[tuple[int, float], ...]:
    field = str(info.field_name)
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise InvalidRequestError(field, f"{field} is {_kind(value)}: must be an object of token id to number")
    biases: dict[int, float] = {}
    for key, bias in _check_count(field, value).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError(field, f"{field} has the key {key[:40]!r}: must be a token id, 0 or larger")
        if not isinstance(bias, int | float) or isinstance(bias, bool):
            raise InvalidRequestError(field, f"{field}[{key}] is {_kind(bias)}: must be a number")
        biases[int(key)] = float(max(min(bias, 10**6), -(10**6))) if isinstance(bias, int) else bias
    return tuple(biases.items())


def _content(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"is {_kind(value)}: must be a string or a list of text parts")
    texts = []
    for position, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise ValueError(f"has part {position} of type {str(kind)[:40]!r}: only 'text' parts are supported")
        text = part.get("text")
        if not isinstance(text, str) or len(part) != 2:
            raise ValueError(f"part {position} must be {{'type': 'text', 'text': a string}} and nothing else")
        texts.append(text)
    return "\n".join(texts)


def _metadata(value: Any, info: ValidationInfo) -> dict[str, str] | None:
    field = str(info.field_name)
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_METADATA_KEYS:
        raise InvalidRequestError(field, f"{field} must be an object of at most {MAX_METADATA_KEYS} strings")
    for key, text in value.items():
        if not isinstance(text, str):
            raise InvalidRequestError(field, f"{field}.{key[:40]} is {_kind(text)}: must be a string")
    return value


def _template_variables(value: Any, info: ValidationInfo) -> dict[str, Any] | None:
    field = str(info.field_name)
    if value is not None and not isinstance(value, dict):
        raise InvalidRequestError(field, f"{field} is {_kind(value)}: must be an object")
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise InvalidRequestError(field, f"{field} holds a number that is not finite") from error
    return value


def refuse_unknown(content: Any, known: Container[str]) -> Any:
    """Check an object's keys before anything else, and stop at the first unknown one.

    Pydantic's own check makes a record of every unknown key, which a hostile body could hold by the million.
    """
    if isinstance(content, dict):
        for name in content:
            if name not in known:
                raise PydanticCustomError(UNKNOWN_PARAMETER, "unknown parameter", {"name": name})
    return content


class Neutral:
    """Marks a parameter that OpenAI knows and this server does not: only values that change nothing are taken.

    Args:
        *values: those values besides null.
    """

    def __init__(self, *values: Any) -> None:
        self._values = (None, *values)

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        if not any(type(value) is type(allowed) and value == allowed for allowed in self._values):
            field = str(info.field_name)
            raise InvalidRequestError(field, f"{field} is not supported by this server: leave it out")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Pydantic's hook for validation."""
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Pydantic's hook for the OpenAPI document."""
        return {"enum": list(self._values), "description": "Not supported: only values without effect are accepted."}


_INTEGERS: Final = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_STRINGS: Final = {"type": "array", "items": {"type": "string"}, "minItems": 1}

TokenIds = Annotated[tuple[int, ...], PlainValidator(_token_ids), WithJsonSchema({**_INTEGERS})]
StopTokenIds = Annotated[
    tuple[int, ...],
    PlainValidator(_stop_token_ids),
    WithJsonSchema({"anyOf": [{**_INTEGERS, "maxItems": MAX_LISTED_TOKENS}, {"type": "null"}]}),
]
Metadata = Annotated[
    dict[str, str] | None,
    PlainValidator(_metadata),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": MAX_METADATA_KEYS},
                {"type": "null"},
            ]
        }
    ),
]
TemplateVariables = Annotated[
    dict[str, Any] | None,
    PlainValidator(_template_variables),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]}),
]
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    PlainValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _STRINGS, {**_INTEGERS, "minItems": 1}, {"type": "array", "items": _INTEGERS}]}
    ),
]
StopStrings = Annotated[
    tuple[str, ...],
    PlainValidator(_stop_strings),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                    "maxItems": MAX_STOP_STRINGS,
                },
                {"type": "null"},
            ]
        }
    ),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                    "maxProperties": MAX_LISTED_TOKENS,
                },
                {"type": "null"},
            ]
        }
    ),
]
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str | None,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}),
]

"""Sections of a simulation's spec, derived from the dataclasses that they become: a field there is a key here, with its
type and default. Unknown keys, wrong types and values out of range are refused with the path of the key.
"""

import dataclasses
from collections.abc import Container, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pomona.core.errors import ConfigError

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_sections: dict[tuple[type, str | None], type[BaseModel]] = {}


def section(kind: type, tag: str | None = None, leave_out: frozenset[str] = frozenset()) -> Any:
    """The pydantic model of a dataclass.

    Args:
        kind: a dataclass; nested dataclasses become nested sections.
        tag: value of an additional key ``kind`` that tells alternatives apart.
        leave_out: fields that cannot be written in a file; they keep their defaults.
    """
    found = _sections.get((kind, tag))
    if found is None:
        hints = get_type_hints(kind)
        entries: dict[str, Any] = {"kind": (Literal[tag], ...)} if tag is not None else {}
        for field in dataclasses.fields(kind):
            if field.name not in leave_out:
                entries[field.name] = (_annotation(hints[field.name]), _default(field))
        found = create_model(f"{kind.__name__}Section", __config__=STRICT, **entries)
        _sections[kind, tag] = found
    return found


def origin_of(model: type[BaseModel]) -> type | None:
    """The dataclass that a section was derived from; None if it was written by hand."""
    return next((kind for (kind, _), made in _sections.items() if made is model), None)


def _annotation(annotation: Any) -> Any:
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return section(annotation)
    if get_origin(annotation) is not None and get_origin(annotation) is not Literal:
        assert not any(dataclasses.is_dataclass(part) for part in get_args(annotation)), "no unions of dataclasses"
    return annotation


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        if dataclasses.is_dataclass(field.default_factory):
            return Field(default_factory=section(field.default_factory))
        return Field(default_factory=field.default_factory)
    return ...


def build(kind: type[T], values: BaseModel, path: str, **more: Any) -> T:
    """The dataclass of a section.

    Args:
        kind: which.
        values: the section.
        path: where it stood in the file.
        more: fields that the section does not have.

    Raises:
        ConfigError: the dataclass refuses a value; the message begins with the value's path.
    """
    hints = get_type_hints(kind)
    arguments = dict(more)
    for name in type(values).model_fields:
        if name == "kind" and name not in hints:
            continue
        value = getattr(values, name)
        arguments[name] = build(hints[name], value, f"{path}.{name}") if isinstance(value, BaseModel) else value
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from error


def problem(error: ValidationError, tags: Mapping[str, Container[str]], *inside: str) -> str:
    """What is wrong first: ``path: message``.

    Args:
        error: of a section or a whole spec.
        tags: key of alternatives -> their kinds. Pydantic puts the kind into the path after the key; the file has no
            key of that name.
        inside: where the section stood in the file.
    """
    first = error.errors(include_url=False)[0]
    path = list(inside)
    before: int | str = ""
    for part in first["loc"]:
        if part not in tags.get(str(before), ()):
            path.append(str(part))
        before = part
    message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(path) or '(file)'}: {message}"


def refuse_huge(values: Any, where: str, path: str = "") -> None:
    """Refuse integers that do not fit 64 bits, which TOML allows and arithmetic here does not expect.

    Args:
        values: a file's content, or a part of it.
        where: goes before the path in messages.
        path: of the part.

    Raises:
        ConfigError: there is one; names its path.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            refuse_huge(value, where, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            refuse_huge(value, where, f"{path}.{index}")
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ConfigError(f"{where}{path}: must fit 64 bits")

"""docs/reference/simulation.md, made of the spec: every key with its default and meaning."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.hardware import MACHINES, MODELS
from pomona.sim.plan_spec import PlanSection
from pomona.sim.sections import origin_of
from pomona.sim.spec import ClusterSection, GroupsSection, ReplicaSection, SimulationSpec
from pomona.workload.popularity import GroupPopularity

_HEAD = """# Simulation spec

Every key of the TOML file that `pomona simulate` and `pomona plan` read; [how to use them](../simulator.md). A key
without a default may be left out (some meanings call that None), unless it is *required*. Files are named relative to
the spec; bundled samples have names without a path.
"""
_LIKE: dict[type[BaseModel], type] = {
    ReplicaSection: SchedulerConfig,
    ClusterSection: ClusterConfig,
    GroupsSection: GroupPopularity,
}
"""Section -> where those of its keys are explained that mean the same there."""
_NAMES = {"machine": MACHINES, "model": MODELS}
_TYPES = {int: "integer", float: "number", str: "text", bool: "true, false"}


def render() -> str:
    """The page."""
    paths: dict[type[BaseModel], list[str]] = {}
    for path, model in (("", SimulationSpec), ("plan", PlanSection)):
        for where, found in _walk(path, model):
            paths.setdefault(found, []).append(where)
    return _HEAD + "".join(_render_section(model, found) for model, found in paths.items())


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """What stands below each field of a section, or of what it was derived from."""
    kinds = [_LIKE.get(model), *(origin_of(base) or base for base in reversed(model.__mro__) if _is_section(base))]
    return {name: text for kind in kinds if kind is not None for name, text in _docs_of(kind)}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not BaseModel


def _docs_of(kind: type) -> Iterator[tuple[str, str]]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            yield field.target.id, inspect.cleandoc(str(below.value.value))


def _walk(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """(path, section) of a section and of those inside, parents first."""
    yield path, model
    for name, field in model.model_fields.items():
        for inside in _sections_in(field.annotation):
            yield from _walk(f"{path}.{name}" if path else name, inside)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section that a field holds, or its alternatives."""
    if _is_section(annotation):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _render_section(model: type[BaseModel], paths: list[str]) -> str:
    rows = [_row(name, field, field_docs(model)) for name, field in model.model_fields.items() if _has_row(name, field)]
    kind = model.model_fields.get("kind")
    where = ", ".join(f"`{path}`" for path in paths)
    title = f'{where}: `kind = "{get_args(kind.annotation)[0]}"`' if kind is not None else where
    parts = [f"\n## {title if paths[0] else 'Top level'}\n"]
    about = inspect.getdoc(origin_of(model) or model) or ""
    if paths[0]:
        parts.append(_one_line(about.partition("\n\nRaises:")[0].partition("\n\n")[0]) + "\n")
    if rows:
        parts.append("\n".join(("| key | value | default | meaning |", "|---|---|---|---|", *rows)) + "\n")
    return "\n".join(parts)


def _has_row(name: str, field: FieldInfo) -> bool:
    """False for the key that tells alternatives apart, and for sections, which have tables of their own."""
    return name != "kind" and not _is_section(field.annotation)


def _row(name: str, field: FieldInfo, docs: dict[str, str]) -> str:
    kinds = [str(get_args(section.model_fields["kind"].annotation)[0]) for section in _sections_in(field.annotation)]
    value = f"table of kind {_choices(kinds)}" if kinds else _value(field.annotation)
    if name in _NAMES:
        value = _choices(_NAMES[name])
    meaning = _one_line(docs[name]).replace("|", "\\|")
    return f"| `{name}` | {value} | {_default(field)} | {meaning} |"


def _choices(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _value(annotation: Any) -> str:
    """A type in words."""
    if annotation in _TYPES:
        return _TYPES[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _choices(parts)
    if origin is tuple:
        return f"list of: {_value(parts[0])}" if parts[-1] is ... else f"[{', '.join(map(_value, parts))}]"
    if origin is dict:
        return f"table of: {_value(parts[1])}"
    if origin is Annotated:
        return _value(parts[0])
    return " or ".join(_value(part) for part in parts if part is not type(None))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f'`kind = "{value.kind}"`'  # type: ignore[attr-defined]
    return "" if value is None or value == () else f"`{json.dumps(value)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")

"""Command-line flags derived from AppConfig: one field there is one flag here, with its help and its default."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ByteSize, SecretStr

from pomona.cli.config import AppConfig, load_config

_CONFIG_HELP = "TOML file with the same settings, underscores for dashes."


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag per setting. The command is called as ``command(config, **own_options)``.

    Flags that were not given do not exist for ``load_config``, so environment and file still decide.
    """
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.name != "config"
    ]

    def run(model: str | None = None, config_file: Path | None = None, **values: Any) -> None:
        options = {parameter.name: values.pop(parameter.name) for parameter in own}
        given = {name: value for name, value in values.items() if value not in (None, [])}
        if model is not None:
            given["model"] = model
        command(load_config(given, config_file), **options)

    parameters = [
        _parameter("model", str | None, typer.Argument(help=_help("model"), show_default=False, metavar="[MODEL]")),
        _parameter("config_file", Path | None, typer.Option("--config", help=_CONFIG_HELP, show_default=False)),
    ]
    for name in AppConfig.model_fields:
        if name != "model":
            parameters.append(_parameter(name, _flag_type(name), typer.Option(help=_help(name), show_default=False)))
    # Typer reads both; ``run`` itself takes anything.
    run.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *own)}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def _parameter(name: str, flag_type: Any, option: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[flag_type, option])


def _help(name: str) -> str:
    field = AppConfig.model_fields[name]
    default = field.default
    shown = "" if default is None or default == () else f" [default: {shown_value(default)}]"
    return f"{field.description}{shown}"


def shown_value(value: object) -> str:
    """A default as people write it."""
    if isinstance(value, ByteSize):
        return value.human_readable(separator="")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flag_type(name: str) -> Any:
    """The type that the command line takes: text for sizes and secrets, lists for tuples, else the field's own."""
    annotation = AppConfig.model_fields[name].annotation
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is tuple:
        return list[str] | None
    if ByteSize in (annotation, *parts) or SecretStr in (annotation, *parts):
        return str | None
    return annotation if type(None) in get_args(annotation) else annotation | None  # type: ignore[operator]

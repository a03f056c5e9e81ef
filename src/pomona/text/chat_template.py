"""Chat messages to prompt text, with the checkpoint's own jinja2 template.

Templates come with checkpoints and are not trusted: they run in jinja2's immutable sandbox. The names offered to them
are those that Hugging Face templates use (transformers documentation, "Chat templates").
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from pomona.core.errors import CheckpointError, InvalidRequestError
from pomona.text.tokenizer import Tokenizer, read_json_object

TEMPLATE_FILE: Final = "chat_template.jinja"
_RESERVED: Final = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now", "self"})


class _GenerationTag(ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; here its content is just content."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own interface

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        return [nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.datetime.now().strftime(format_string)


def _to_json(  # transformers' parameters in transformers' order
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    # jinja2's own filter escapes HTML characters, which prompts must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> sandbox.ImmutableSandboxedEnvironment:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template; any thread may use it.

    Args:
        source: jinja2 source.
        special_tokens: "bos_token", "eos_token", ... to their text, offered to the template.
        where: file name for error messages.

    Raises:
        CheckpointError: the source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str = TEMPLATE_FILE) -> None:
        self.source: Final = source
        self._special_tokens = dict(special_tokens)
        self._knows_developer = re.search(r"""["']developer["']""", source) is not None
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{where}: the chat template is not valid jinja2: {error}") from error

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """Find a checkpoint's template: chat_template.jinja, else ``chat_template`` in tokenizer_config.json.

        Returns:
            None if the checkpoint has no template (many base models have none).

        Raises:
            CheckpointError: the template is broken, or of several named ones none is called ``default``.
        """
        path = folder / TEMPLATE_FILE
        try:
            return cls(path.read_text(encoding="utf-8"), tokenizer.special_tokens, str(path))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        path = folder / "tokenizer_config.json"
        source = read_json_object(path).get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            if "default" not in named:
                raise CheckpointError(f"{path}: chat_template: no template is named 'default' among {list(named)}")
            source = named["default"]
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{path}: chat_template: must be a string or a list of named templates")
        return cls(source, tokenizer.special_tokens, str(path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text; special tokens are written out in it, so encode without adding any.

        Args:
            messages: {"role": ..., "content": ...} each; where the template does not know ``developer``, it is
                shown ``system``.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: further names for the template, such as ``enable_thinking``.

        Raises:
            InvalidRequestError: the template refuses these messages, or ``variables`` holds a reserved name.
        """
        variables = variables or {}
        reserved = sorted(variables.keys() & (_RESERVED | self._special_tokens.keys()))
        if reserved:
            raise InvalidRequestError("chat_template_kwargs", f"chat_template_kwargs: {reserved[0]!r} is reserved")
        names = {"tools": None, "documents": None, **self._special_tokens, **variables}
        known = [self._as_known(message) for message in messages]
        try:
            return self._template.render(names, messages=known, add_generation_prompt=add_generation_prompt)
        # A template fails with whatever its expressions raise on values that it did not expect.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ) as error:
            raise InvalidRequestError(
                "messages", f"messages: the model's chat template refuses them: {error or type(error).__name__}"
            ) from error

    def _as_known(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as templates expect it: fields that are None left out, as transformers leaves them out, and the
        role ``developer`` under its older name, for many templates drop messages of roles that they do not know."""
        known = {name: value for name, value in message.items() if value is not None}
        if known.get("role") == "developer" and not self._knows_developer:
            known["role"] = "system"
        return known

"""Request bodies to prompt token ids. Long texts are tokenized in a thread, so that no stream waits for them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pomona.core.errors import InvalidRequestError
from pomona.server.context import ServerContext
from pomona.server.protocol import ChatMessage
from pomona.server.sampling import check_token_id

MAX_INLINE_CHARS: Final = 4096
"""Texts up to this length are tokenized at once (about a millisecond); a thread would cost more."""
_MAX_SHOWN_CHARS: Final = 100


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt."""

    token_ids: tuple[int, ...]
    text: str | None
    """As the client wrote it; None if it sent ids."""


async def encode(context: ServerContext, field: str, text: str, *, add_special_tokens: bool) -> list[int]:
    """Tokenize, beside the event loop if the text is long.

    Raises:
        InvalidRequestError: ``field``'s text holds a token that the model does not have.
    """

    def tokenize() -> list[int]:
        return _encode(context, field, text, add_special_tokens=add_special_tokens)

    return tokenize() if len(text) <= MAX_INLINE_CHARS else await asyncio.to_thread(tokenize)


def _encode(context: ServerContext, field: str, text: str, *, add_special_tokens: bool) -> list[int]:
    """Tokenize at once. A tokenizer may have tokens that were added to it and never to the model."""
    token_ids = context.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    largest, vocab_size = max(token_ids, default=0), context.model.vocab_size
    if largest >= vocab_size:
        token = context.tokenizer.token_text(largest)
        raise InvalidRequestError(
            field,
            f"{field} holds {token[:_MAX_SHOWN_CHARS]!r}, token {largest}: the model has tokens below {vocab_size}",
        )
    return token_ids


async def completion_prompts(
    context: ServerContext, prompts: Sequence[str | tuple[int, ...]], *, add_special_tokens: bool
) -> list[Prompt]:
    """Return the prompts of a plain completion.

    Raises:
        InvalidRequestError: one is empty, or holds a token that the model does not have.
    """

    def check() -> list[Prompt]:
        checked = []
        for position, prompt in enumerate(prompts):
            field = "prompt" if len(prompts) == 1 else f"prompt[{position}]"
            if isinstance(prompt, str):
                token_ids = tuple(_encode(context, field, prompt, add_special_tokens=add_special_tokens))
            else:
                token_ids = prompt
                check_token_id(field, max(prompt, default=0), context.model.vocab_size)
            if not token_ids:
                raise InvalidRequestError(field, f"{field} is empty: at least one token is needed")
            checked.append(Prompt(token_ids, prompt if isinstance(prompt, str) else None))
        return checked

    num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return check() if num_chars <= MAX_INLINE_CHARS else await asyncio.to_thread(check)


async def chat_token_ids(
    context: ServerContext,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool,
    add_special_tokens: bool,
    variables: dict[str, Any] | None,
) -> tuple[int, ...]:
    """Return the prompt of a conversation.

    Raises:
        InvalidRequestError: the model has no chat template, the template refuses the messages, or they hold a token
            that the model does not have.
    """
    template = context.chat_template
    if template is None:
        raise InvalidRequestError(
            "messages",
            f"messages: the model {context.model.name!r} has no chat template (neither chat_template.jinja nor "
            "chat_template in tokenizer_config.json): use /v1/completions",
        )
    plain = [message.model_dump(include={"role", "content", "name"}, exclude_none=True) for message in messages]
    for message in plain:
        message.setdefault("content", "")
    num_chars = sum(len(text) for message in plain for text in message.values()) + len(str(variables))

    def render() -> list[int]:
        text = template.render(plain, add_generation_prompt=add_generation_prompt, variables=variables)
        return _encode(context, "messages", text, add_special_tokens=add_special_tokens)

    is_short = num_chars <= MAX_INLINE_CHARS and len(plain) <= 64
    token_ids = render() if is_short else await asyncio.to_thread(render)
    if not token_ids:
        raise InvalidRequestError("messages", "messages: the chat template renders them to an empty prompt")
    return tuple(token_ids)

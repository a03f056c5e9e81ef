"""POST /tokenize and /detokenize."""

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pomona.core.errors import InvalidRequestError
from pomona.server.body import read_model
from pomona.server.context import context_of
from pomona.server.prompts import MAX_INLINE_CHARS, chat_token_ids, encode
from pomona.server.protocol import DetokenizeRequest, TokenizeRequest
from pomona.server.responses import Detokenized, Tokenized
from pomona.server.sampling import check_token_id
from pomona.server.tenant_adapters import adapters_of


async def tokenize(request: Request) -> Response:
    """Show the token ids of a prompt or a conversation."""
    context = context_of(request)
    body = await read_model(request, TokenizeRequest, context.config.max_body_bytes)
    if body.model is not None:
        await adapters_of(request).find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt", "prompt or messages: exactly one of them is needed")
    if body.messages is None:
        assert body.prompt is not None
        token_ids = await encode(
            context, "prompt", body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    else:
        rendered = await chat_token_ids(
            context,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
            variables=body.chat_template_kwargs,
        )
        token_ids = list(rendered)

    def answer() -> bytes:
        texts = [context.tokenizer.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
        return msgspec.json.encode(Tokenized(len(token_ids), context.model.max_model_len, token_ids, texts))

    is_short = len(token_ids) <= MAX_INLINE_CHARS
    content = answer() if is_short else await asyncio.to_thread(answer)
    return Response(content, media_type="application/json")


async def detokenize(request: Request) -> Response:
    """Show the text of token ids, control tokens included."""
    context = context_of(request)
    body = await read_model(request, DetokenizeRequest, context.config.max_body_bytes)
    if body.model is not None:
        await adapters_of(request).find(body.model)
    check_token_id("tokens", max(body.tokens, default=0), context.model.vocab_size)
    text = await asyncio.to_thread(context.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return Response(msgspec.json.encode(Detokenized(text)), media_type="application/json")

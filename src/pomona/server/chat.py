"""POST /v1/chat/completions."""

import time
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from pomona.server import sampling
from pomona.server.answers import ChatFormat
from pomona.server.body import read_model
from pomona.server.context import ServerContext, context_of
from pomona.server.generation import Job, respond
from pomona.server.prompts import Prompt, chat_token_ids
from pomona.server.protocol import ChatCompletionRequest


async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    arrival_s = time.monotonic()
    context = context_of(request)
    body = await read_model(request, ChatCompletionRequest, context.config.max_body_bytes)

    async def plan_job(response_id: str) -> Job:
        return await _job_of(context, body, response_id, arrival_s)

    return respond(request, body, "chatcmpl", plan_job, ChatFormat)


async def _job_of(context: ServerContext, body: ChatCompletionRequest, response_id: str, arrival_s: float) -> Job:
    sampling.check_combinations(body)
    n = sampling.num_choices(body, 1, context.config.max_choices)
    num_logprobs = sampling.chat_logprobs(body)
    shared = sampling.sampling_of(body, context.model)
    token_ids = await chat_token_ids(
        context,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        add_special_tokens=bool(body.add_special_tokens),
        variables=body.chat_template_kwargs,
    )
    is_new_name = body.max_completion_tokens is not None
    asked = body.max_completion_tokens if is_new_name else body.max_tokens
    field = "max_completion_tokens" if is_new_name else "max_tokens"
    max_tokens = sampling.output_budget(
        (field, asked), ("messages", len(token_ids)), context.model.max_model_len, default=None
    )
    base = replace(sampling.for_prompt(shared, max_tokens, field), logprobs=num_logprobs)
    return Job(
        response_id=response_id,
        arrival_s=arrival_s,
        prompts=(Prompt(token_ids, None),),
        n=n,
        sampling=tuple(replace(base, seed=seed) for seed in sampling.seeds_of(body, n)),
        rules=sampling.text_rules(body, is_continuation=False, has_logprobs=num_logprobs is not None),
        has_echo=False,
        is_stream=bool(body.stream),
        has_usage_event=bool(body.stream_options and body.stream_options.include_usage),
        service_tier=body.service_tier,
    )

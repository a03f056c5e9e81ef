"""POST /v1/completions."""

import time
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from pomona.core.errors import InvalidRequestError
from pomona.core.request import SamplingParams
from pomona.server import sampling
from pomona.server.answers import CompletionFormat
from pomona.server.body import read_model
from pomona.server.context import ServerContext, context_of
from pomona.server.generation import Job, respond
from pomona.server.prompts import Prompt, completion_prompts
from pomona.server.protocol import CompletionRequest


async def create_completion(request: Request) -> Response:
    """Continue a text."""
    arrival_s = time.monotonic()
    context = context_of(request)
    body = await read_model(request, CompletionRequest, context.config.max_body_bytes)

    async def plan_job(response_id: str) -> Job:
        return await _job_of(context, body, response_id, arrival_s)

    return respond(request, body, "cmpl", plan_job, CompletionFormat)


async def _job_of(context: ServerContext, body: CompletionRequest, response_id: str, arrival_s: float) -> Job:
    sampling.check_combinations(body)
    n = sampling.num_choices(body, len(body.prompt), context.config.max_choices)
    shared = replace(sampling.sampling_of(body, context.model), logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        shared = replace(shared, prompt_logprobs=body.logprobs)
    is_prompt_only = bool(body.echo) and body.max_tokens == 0
    prompts = await completion_prompts(context, body.prompt, add_special_tokens=body.add_special_tokens is not False)
    rules = sampling.text_rules(body, is_continuation=True, has_logprobs=body.logprobs is not None)
    return Job(
        response_id=response_id,
        arrival_s=arrival_s,
        prompts=tuple(prompts),
        n=n,
        sampling=tuple(
            replace(params, seed=seed)
            for params in [_of_prompt(context, body, shared, prompt) for prompt in prompts]
            for seed in sampling.seeds_of(body, n)
        ),
        rules=replace(rules, hides_output=is_prompt_only),
        has_echo=bool(body.echo),
        is_stream=bool(body.stream),
        has_usage_event=bool(body.stream_options and body.stream_options.include_usage),
        service_tier=body.service_tier,
    )


def _of_prompt(
    context: ServerContext, body: CompletionRequest, shared: SamplingParams, prompt: Prompt
) -> SamplingParams:
    asked = body.max_tokens
    if asked == 0 and body.echo:  # the engine makes one token at least; it will not be shown
        asked = 1
        if body.min_tokens:
            raise InvalidRequestError.out_of_range("min_tokens", body.min_tokens, "0, as max_tokens is 0")
    max_tokens = sampling.output_budget(
        ("max_tokens", asked),
        ("prompt", len(prompt.token_ids)),
        context.model.max_model_len,
        default=max(sampling.DEFAULT_COMPLETION_TOKENS, body.min_tokens or 0),
    )
    return sampling.for_prompt(shared, max_tokens, "max_tokens")

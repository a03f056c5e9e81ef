"""Runs one chat or completion request: engine requests out, text back, as a stream or as one body."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request as HTTPRequest

from pomona.accounts.ledger import Entry
from pomona.core.errors import PomonaError
from pomona.core.ids import RequestId
from pomona.core.output import RequestOutput
from pomona.core.plan import TokenLogprobs
from pomona.core.request import Request, SamplingParams
from pomona.server.adapter_service import Lease
from pomona.server.answers import AnswerFacts, AnswerFormat
from pomona.server.choice import Choice, Piece, PromptEcho, TextRules
from pomona.server.context import ServerContext, context_of, request_id_of
from pomona.server.errors import error_body
from pomona.server.fan_out import FanOut
from pomona.server.limits import RequestSize, admitted
from pomona.server.prompts import Prompt
from pomona.server.protocol import GenerationRequest
from pomona.server.reply import Reply, WatchedResponse
from pomona.server.responses import PromptTokensDetails, Usage
from pomona.server.service_level import ServiceTier
from pomona.server.tenant import Caller, principal_of, tenant_caller
from pomona.server.tenant_adapters import adapters_of


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, ready to run. Choice ``p * n + i`` is the i-th of prompt p."""

    response_id: str
    arrival_s: float
    """Monotonic clock when the request came in."""
    prompts: tuple[Prompt, ...]
    n: int
    sampling: tuple[SamplingParams, ...]
    """One per choice."""
    rules: TextRules
    has_echo: bool
    is_stream: bool
    has_usage_event: bool
    service_tier: ServiceTier | None = None

    def size(self, body: GenerationRequest) -> RequestSize:
        """Return what limits are asked about: output counts as far as the client has bounded it."""
        is_bounded = body.max_tokens is not None or getattr(body, "max_completion_tokens", body) is not None
        return RequestSize(
            prompt_tokens=tuple(len(prompt.token_ids) for prompt in self.prompts),
            max_output_tokens=sum(params.max_tokens for params in self.sampling) if is_bounded else 0,
            choices_per_prompt=self.n,
        )


@dataclass(frozen=True, slots=True)
class _Backing:
    """What stands behind a job: the adapter, whose work it is, and the line of the ledger, if there is one."""

    lease: Lease
    caller: Caller
    entry: Entry | None = None


class _Progress:
    """One choice under way: an echoed prompt, then the output."""

    __slots__ = ("_echo", "_prompt_logprobs", "choice", "opening", "whole")

    def __init__(self, choice: Choice, echo: PromptEcho | None, opening: bytes) -> None:
        self.choice = choice
        self.whole = Piece()
        """Everything so far, if the answer is not streamed."""
        self.opening = opening
        """Events that begin the choice, until they are sent."""
        self._echo = echo
        self._prompt_logprobs: list[TokenLogprobs] = []

    def advance(self, output: RequestOutput) -> Piece:
        """Return what this output adds; maybe nothing."""
        piece = self.choice.advance(output)
        if self._echo is not None:
            self._prompt_logprobs.extend(output.prompt_logprobs)
            if self._echo.is_complete(len(self._prompt_logprobs)):
                prompt = self._echo.piece(self._prompt_logprobs)
                prompt.extend(piece)
                self._echo = None
                return prompt
        return piece


def respond(
    request: HTTPRequest,
    body: GenerationRequest,
    id_prefix: str,
    plan_job: Callable[[str], Awaitable[Job]],
    answer_format: Callable[[AnswerFacts], AnswerFormat],
) -> WatchedResponse:
    """Return the response that resolves the model, plans the job, and runs it for as long as the client listens.

    Args:
        request: the HTTP request, its body already read.
        body: what the body says.
        id_prefix: of the answer's id, such as "cmpl".
        plan_job: checks everything else about the body; takes the answer's id.
        answer_format: how the answer is worded.
    """
    context = context_of(request)
    response_id = f"{id_prefix}-{request_id_of(request)}"

    async def produce(reply: Reply) -> None:
        adapters = adapters_of(request)
        # What is wrong with a request is told, and limits are asked, before its adapter is brought in.
        found = await adapters.find(body.model)
        job = await plan_job(response_id)
        facts = AnswerFacts(
            tokenizer=context.tokenizer,
            response_id=response_id,
            created_s=int(time.time()),  # noqa: TID251  # a date for people
            model=body.model,
            has_logprobs=job.rules.has_logprobs,
            has_usage_event=job.has_usage_event,
        )
        principal = principal_of(request)
        if principal is None:
            async with adapters.lease(body.model) as lease:
                await run(context, job, _Backing(lease, context.default_caller), answer_format(facts), reply)
            return
        adapter_name = None if found is None else found.name
        async with (
            admitted(request, principal, adapter_name, job.size(body)) as generation,
            adapters.lease(body.model) as lease,
        ):
            entry = generation.begin(lease, response_id)
            backing = _Backing(lease, tenant_caller(request, principal), entry)
            await run(context, job, backing, answer_format(facts), reply)

    return WatchedResponse(produce)


async def run(context: ServerContext, job: Job, backing: _Backing, answer: AnswerFormat, reply: Reply) -> None:
    """Run a job to the end of its answer.

    Raises:
        PomonaError: before anything was sent; later errors become the last event of the stream.
    """
    progress = _start_choices(context, job, answer)
    series = context.metrics.series_of(backing.lease.adapter_name)
    requests = _engine_requests(context, job, backing)
    try:
        is_prompt_only = job.rules.hides_output
        async with FanOut(context.client, requests, series, backing.entry, is_prompt_only=is_prompt_only) as fan_out:
            async for index, output in fan_out:
                one = progress[index]
                piece = one.advance(output)
                if piece.finish_reason is not None and output.finish_reason is None:
                    await fan_out.finish(index)
                if not job.is_stream:
                    one.whole.extend(piece)
                    continue
                events = b"" if piece.is_empty else answer.chunk(index, piece)
                if one.opening:
                    events, one.opening = one.opening + events, b""
                if events:
                    await reply.events(events)
    except PomonaError as error:
        if not reply.has_started:
            raise
        await reply.events(b"data: " + error_body(error) + b"\n\n")
        await reply.end()
        return
    usage = _usage(job, progress, backing.entry)
    if not job.is_stream:
        await reply.json(answer.body([one.whole for one in progress], usage))
        return
    if job.has_usage_event:
        await reply.events(answer.usage(usage))
    await reply.end()


def _start_choices(context: ServerContext, job: Job, answer: AnswerFormat) -> list[_Progress]:
    progress: list[_Progress] = []
    for prompt in job.prompts:
        for _ in range(job.n):
            echo = None
            if job.has_echo:
                echo = PromptEcho(context.tokenizer, prompt.token_ids, prompt.text, job.rules)
            text_offset = 0 if echo is None else len(echo.text)
            choice = Choice(context.tokenizer, job.rules, context.model.eos_token_ids, text_offset)
            progress.append(_Progress(choice, echo, answer.opening(len(progress))))
    return progress


def _engine_requests(context: ServerContext, job: Job, backing: _Backing) -> list[Request]:
    level = context.config.service_levels.level_of(backing.caller, job.service_tier)
    return [
        Request(
            request_id=RequestId(f"{job.response_id}-{index}"),
            prompt_token_ids=job.prompts[index // job.n].token_ids,
            sampling=sampling,
            arrival_s=job.arrival_s,
            tenant_id=backing.caller.tenant_id,
            adapter_id=backing.lease.adapter_id,
            cache_salt=backing.caller.cache_salt,
            service_level=level,
        )
        for index, sampling in enumerate(job.sampling)
    ]


def _usage(job: Job, progress: list[_Progress], entry: Entry | None) -> Usage:
    """What the answer says of itself: the same as its line in the ledger, if there is one."""
    if entry is not None:
        num_output_tokens, num_cached_tokens, num_prompt_tokens = entry.counted
    else:
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        num_output_tokens = sum(one.choice.num_output_tokens for one in progress)
        # The first choice of each prompt: the others find in the cache what it computed.
        num_cached_tokens = sum(one.choice.num_cached_tokens for one in progress[:: job.n])
    return Usage(
        num_prompt_tokens,
        num_output_tokens,
        num_prompt_tokens + num_output_tokens,
        PromptTokensDetails(num_cached_tokens),
    )

"""What the scheduler tells of a sequence besides tokens: log-probabilities and endings."""

from pomona.core.output import RequestOutput
from pomona.core.plan import ScheduledSeq, StepResult, TokenLogprobs
from pomona.core.request import FinishReason
from pomona.sched.sequence import Sequence

NO_LOGPROBS: tuple[tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]] = ((), ())


def logprobs_of(
    seq: Sequence, entry: ScheduledSeq, result: StepResult
) -> tuple[tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]:
    """The sequence's part of a result: of its new token, and of those prompt tokens that were not sent before it was
    preempted. Counts the latter as sent."""
    new = result.logprobs.get(seq.request_id)
    prompt = result.prompt_logprobs.get(seq.request_id, ())
    if prompt:
        num_sent_before = seq.num_prompt_logprobs_sent - entry.num_computed_tokens
        assert num_sent_before >= 0, "a prompt token was skipped"
        prompt = prompt[num_sent_before:]
        seq.num_prompt_logprobs_sent += len(prompt)
    return (new,) if new is not None else (), prompt


def output_of(
    seq: Sequence,
    *,
    prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    finish_reason: FinishReason | None = None,
    error: str | None = None,
) -> RequestOutput:
    """News of a sequence other than a token."""
    return RequestOutput(
        request_id=seq.request_id,
        prompt_logprobs=prompt_logprobs,
        finish_reason=finish_reason,
        error=error,
        num_cached_tokens=seq.num_cached_tokens,
        first_scheduled_s=seq.first_scheduled_s,
    )

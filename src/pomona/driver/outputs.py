"""Joining outputs of one request: what a slow reader gets instead of a longer and longer queue."""

from collections.abc import Iterable, Sequence
from itertools import chain

from pomona.core.ids import RequestId
from pomona.core.output import RequestOutput


def join_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one request, oldest first, as the one output that says the same."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    return RequestOutput(
        request_id=last.request_id,
        new_token_ids=tuple(chain.from_iterable(output.new_token_ids for output in outputs)),
        logprobs=tuple(chain.from_iterable(output.logprobs for output in outputs)),
        prompt_logprobs=tuple(chain.from_iterable(output.prompt_logprobs for output in outputs)),
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        error=last.error,
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
        first_scheduled_s=next(
            (output.first_scheduled_s for output in outputs if output.first_scheduled_s is not None), None
        ),
    )


def join_by_request(outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
    """At most one output per request, in the order in which the requests first appear."""
    by_request: dict[RequestId, list[RequestOutput]] = {}
    for output in outputs:
        by_request.setdefault(output.request_id, []).append(output)
    return [join_outputs(own) for own in by_request.values()]

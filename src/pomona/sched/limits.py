"""What one replica can never serve, whatever else it does: refused before it is queued."""

from collections.abc import Sequence

from pomona.core.errors import InvalidRequestError, PromptTooLongError
from pomona.core.request import Request
from pomona.sched.config import SchedulerConfig


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Make sure that the request, alone on an empty replica, could run to its end.

    Raises:
        InvalidRequestError: a token id is not the model's.
        PromptTooLongError: the prompt does not fit the context, or its tokens and those asked for the KV cache.
    """
    token_ids = request.prompt_token_ids
    # Kernels take token ids for places in a table, and look no further.
    _check_token_ids("prompt", token_ids, config.vocab_size)
    _check_token_ids("logit_bias", [token_id for token_id, _ in request.sampling.logit_bias], config.vocab_size)
    if request.sampling.min_tokens:
        _check_token_ids("stop_token_ids", request.sampling.stop_token_ids, config.vocab_size)
    num_prompt = len(token_ids)
    if num_prompt >= config.max_model_len:
        raise PromptTooLongError(
            "prompt",
            f"prompt has {num_prompt} tokens: the context of {config.max_model_len} tokens has room for "
            f"{config.max_model_len - 1} and one token of output",
        )
    # The last token of a sequence is never computed, so it needs no KV.
    num_kv_tokens = min(num_prompt + request.sampling.max_tokens, config.max_model_len) - 1
    num_slots = config.num_kv_blocks * config.block_size
    if num_kv_tokens > num_slots:
        raise PromptTooLongError(
            "max_tokens",
            f"prompt of {num_prompt} tokens with max_tokens {request.sampling.max_tokens} needs {num_kv_tokens} KV "
            f"slots: the whole KV cache has {num_slots}",
        )


def _check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError.out_of_range(field, token_id, f"a token id from 0 to {vocab_size - 1}")

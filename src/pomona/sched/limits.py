"""What one replica can never serve, whatever else it does: refused before it is queued."""

from pomona.core.errors import InvalidRequestError, PromptTooLongError
from pomona.core.request import Request
from pomona.sched.config import SchedulerConfig

MAX_TOKEN_ID = 2**31 - 1


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Make sure that the request, alone on an empty replica, could run to its end.

    Raises:
        InvalidRequestError: a token id cannot be one.
        PromptTooLongError: the prompt does not fit the context, or its tokens and those asked for the KV cache.
    """
    token_ids = request.prompt_token_ids
    if min(token_ids) < 0 or max(token_ids) > MAX_TOKEN_ID:
        raise InvalidRequestError("prompt", f"prompt has token ids outside 0 to {MAX_TOKEN_ID}")
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

"""From a request's parameters to the engine's: defaults, limits that depend on the model, seeds, stop ids."""

import secrets
from dataclasses import replace
from typing import Final

from pomona.core.errors import InvalidRequestError, PromptTooLongError
from pomona.core.request import MAX_LOGPROBS, MAX_SEED, SamplingParams
from pomona.server.choice import TextRules
from pomona.server.config import ServedModel
from pomona.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from pomona.text.stop import StopStrings

DEFAULT_COMPLETION_TOKENS: Final = 16


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def num_choices(body: GenerationRequest, num_prompts: int, max_choices: int) -> int:
    """Return ``n``, checked.

    Raises:
        InvalidRequestError: ``n`` is not positive, or there would be more than ``max_choices`` choices in all.
    """
    n = 1 if body.n is None else body.n
    if n < 1:
        raise InvalidRequestError.out_of_range("n", n, "at least 1")
    if n * num_prompts > max_choices:
        what = f"n is {n}" if num_prompts == 1 else f"n is {n} for {num_prompts} prompts"
        raise InvalidRequestError("n", f"{what}: at most {max_choices} choices are allowed in one request")
    return n


def output_budget(
    asked: tuple[str, int | None], prompt: tuple[str, int], max_model_len: int, default: int | None
) -> int:
    """Return ``max_tokens`` for one prompt.

    Args:
        asked: the parameter's name and what the client wrote; None for nothing.
        prompt: the parameter's name and the prompt's length in tokens.
        max_model_len: most tokens of prompt and output together.
        default: used if nothing was asked, as far as there is room; None takes all the room.

    Raises:
        PromptTooLongError: there is no room for the prompt and one token, or for as many as asked.
    """
    (field, num_asked), (prompt_field, num_prompt_tokens) = asked, prompt
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise PromptTooLongError(
            prompt_field,
            f"The prompt has {num_prompt_tokens} tokens: at most {max_model_len - 1} fit the model's context of "
            f"{max_model_len} tokens, which must hold at least one output token too.",
        )
    if num_asked is None:
        return room if default is None else min(room, default)
    if num_asked > room:
        raise PromptTooLongError(
            field,
            f"{field} is {num_asked} and the prompt has {num_prompt_tokens} tokens: together more than the model's "
            f"context of {max_model_len} tokens.",
        )
    return num_asked


def sampling_of(body: GenerationRequest, model: ServedModel) -> SamplingParams:
    """Return the parameters that all choices share; ``max_tokens``, ``seed`` and log-probabilities are set later.

    Raises:
        InvalidRequestError: a value is out of range, or a token id is not in the vocabulary.
    """
    for token_id, _ in body.logit_bias:
        check_token_id("logit_bias", token_id, model.vocab_size)
    for token_id in body.stop_token_ids:
        check_token_id("stop_token_ids", token_id, model.vocab_size)
    own_ends = () if body.ignore_eos else model.eos_token_ids
    return SamplingParams(
        max_tokens=2**31,  # replaced per prompt; only min_tokens is checked against it here
        min_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=0 if body.top_k is None or body.top_k == -1 else min(body.top_k, model.vocab_size),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias,
        stop_token_ids=tuple(sorted({*own_ends, *body.stop_token_ids})),
    )


def check_token_id(field: str, token_id: int, vocab_size: int) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        InvalidRequestError: ``token_id`` is not below ``vocab_size``.
    """
    if token_id >= vocab_size:
        raise InvalidRequestError.out_of_range(field, token_id, f"a token id below {vocab_size}")


def seeds_of(body: GenerationRequest, n: int) -> list[int]:
    """Return the seeds of one prompt's choices: ``seed`` + i, or random ones if no seed was asked for.

    Raises:
        InvalidRequestError: ``seed`` has more than 64 bits.
    """
    if body.seed is None:
        return [secrets.randbits(63) for _ in range(n)]
    if not -MAX_SEED - 1 <= body.seed <= MAX_SEED:
        raise InvalidRequestError.out_of_range("seed", body.seed, f"between {-MAX_SEED - 1} and {MAX_SEED}")
    return [(body.seed + index) % (MAX_SEED + 1) for index in range(n)]


def for_prompt(shared: SamplingParams, max_tokens: int, field: str) -> SamplingParams:
    """Set ``max_tokens``, under the name that the client knows.

    Raises:
        InvalidRequestError: it is not positive, or below ``min_tokens``.
    """
    if max_tokens < 1:
        raise InvalidRequestError.out_of_range(field, max_tokens, "at least 1")
    return replace(shared, max_tokens=max_tokens)


def text_rules(body: GenerationRequest, *, is_continuation: bool, has_logprobs: bool) -> TextRules:
    """Return what the request wants of its text."""
    return TextRules(
        stops=StopStrings(body.stop) if body.stop else None,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        is_continuation=is_continuation,
        min_tokens=body.min_tokens or 0,
        has_logprobs=has_logprobs,
    )


def chat_logprobs(body: ChatCompletionRequest) -> int | None:
    """Return how many alternatives chat reports per token; None for no log-probabilities.

    Raises:
        InvalidRequestError: ``top_logprobs`` is out of range, or given without ``logprobs``.
    """
    if body.top_logprobs is not None:
        if not 0 <= body.top_logprobs <= MAX_LOGPROBS:
            raise InvalidRequestError.out_of_range("top_logprobs", body.top_logprobs, f"between 0 and {MAX_LOGPROBS}")
        if not body.logprobs and body.top_logprobs:
            raise InvalidRequestError("top_logprobs", f"top_logprobs is {body.top_logprobs}: needs logprobs to be true")
    return (body.top_logprobs or 0) if body.logprobs else None


def check_combinations(body: ChatCompletionRequest | CompletionRequest) -> None:
    """Refuse parameters that contradict each other.

    Raises:
        InvalidRequestError: names one of them.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options", "stream_options is given: needs stream to be true")
    if isinstance(body, CompletionRequest):
        n = 1 if body.n is None else body.n
        if body.best_of is not None and body.best_of != n:
            raise InvalidRequestError.out_of_range("best_of", body.best_of, f"equal to n, which is {n}")
    elif None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequestError(
            "max_completion_tokens",
            f"max_completion_tokens is {body.max_completion_tokens} and max_tokens is {body.max_tokens}: give one",
        )

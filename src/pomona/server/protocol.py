"""Wire types of request bodies: OpenAI's parameters and a few of our own. Never imported below server.

Unknown parameters are refused. Parameters of OpenAI's that this server does not have are known by name and taken only
at values without effect. None means "not given" throughout, as OpenAI's clients send null for it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pomona.server.service_level import ServiceTier
from pomona.server.wire_fields import (
    Content,
    LogitBias,
    Metadata,
    Neutral,
    Prompts,
    StopStrings,
    StopTokenIds,
    TemplateVariables,
    TokenIds,
    refuse_unknown,
)


def _nothing() -> Any:
    """Default of a list or table: empty for us, null on the wire."""
    return Field((), json_schema_extra={"default": None})


class Wire(BaseModel):
    """Base of request bodies: strict, and every parameter it does not know is refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, content: Any) -> Any:
        return refuse_unknown(content, cls.model_fields)


class StreamOptions(Wire):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    """End the stream with one chunk that has no choices but the usage of the whole request."""
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class GenerationRequest(Wire):
    """What chat and plain completions have in common."""

    model: str
    """A name from /v1/models: the base, an adapter, or ``base:adapter``."""
    max_tokens: int | None = None
    """Most output tokens. Default: 16 for completions, the rest of the context for chat."""
    temperature: float | None = Field(None, examples=[0.7])
    """Below 0.00001 is greedy. Default 1."""
    top_p: float | None = None
    """Nucleus sampling, in (0, 1]. Default 1."""
    top_k: int | None = None
    """Choose among the k most likely tokens; 0 or -1: among all (default)."""
    min_p: float | None = None
    """Drop tokens less likely than this fraction of the most likely one. Default 0."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens already in the output, in [-2, 2]. Default 0."""
    frequency_penalty: float | None = None
    """Subtracted from the logits of tokens once per occurrence in the output, in [-2, 2]. Default 0."""
    repetition_penalty: float | None = None
    """Divides (or multiplies, if negative) the logits of tokens in prompt and output, in [0.01, 100]. Default 1."""
    logit_bias: LogitBias = _nothing()
    """Token id to a number in [-100, 100] that is added to its logit."""
    seed: int | None = None
    """Start of the random stream: the same request with the same seed draws the same. Choice i uses seed + i. Of
    64 bits, of which the lower 63 count."""
    n: int | None = None
    """Choices per prompt. Default 1."""
    stop: StopStrings = _nothing()
    """Strings that end the output; they are not part of it."""
    stop_token_ids: StopTokenIds = _nothing()
    """Token ids that end the output, besides the model's own."""
    ignore_eos: bool | None = None
    """Go on after the model's end-of-sequence tokens."""
    min_tokens: int | None = None
    """Do not stop before this many output tokens."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string or token at the end of the text."""
    skip_special_tokens: bool | None = None
    """Leave control tokens out of the text. Default true."""
    stream: bool | None = None
    """Answer with server-sent events, one per step."""
    stream_options: StreamOptions | None = None
    service_tier: ServiceTier | None = None
    """"priority" goes before others where the operator allows it; "flex" fills what they leave. Default "auto"."""
    user: str | None = None
    """Accepted; has no effect."""


class ChatMessage(Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    """Text, or a list of text parts (joined by line breaks)."""
    name: str | None = None
    """Handed to the chat template."""
    refusal: Annotated[Any, Neutral()] = None
    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None
    annotations: Annotated[Any, Neutral([])] = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    """The newer name of ``max_tokens``."""
    logprobs: bool | None = None
    """Report the log-probability of each output token."""
    top_logprobs: int | None = None
    """Report this many most likely tokens at each position (0 to 20); needs ``logprobs``."""
    add_generation_prompt: bool | None = None
    """End the prompt with the opening of the assistant's answer. Default true."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add special tokens around the rendered prompt. Default false: templates write them."""
    chat_template_kwargs: TemplateVariables = None
    """Further names for the chat template, such as {"enable_thinking": false}."""
    metadata: Metadata = None
    """Accepted; has no effect."""
    prompt_cache_key: str | None = None
    """Accepted; has no effect: equal prompt beginnings are always reused."""
    safety_identifier: str | None = None
    """Accepted; has no effect."""

    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral("none")] = None
    functions: Annotated[Any, Neutral([])] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    moderation: Annotated[Any, Neutral()] = None
    parallel_tool_calls: Annotated[Any, Neutral(True, False)] = None
    prediction: Annotated[Any, Neutral()] = None
    prompt_cache_options: Annotated[Any, Neutral()] = None
    prompt_cache_retention: Annotated[Any, Neutral("in_memory", "in-memory")] = None
    reasoning_effort: Annotated[Any, Neutral()] = None
    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    store: Annotated[Any, Neutral(False)] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    tools: Annotated[Any, Neutral([])] = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    web_search_options: Annotated[Any, Neutral()] = None


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
    """Text, token ids, or a list of either; each prompt has its own choices."""
    echo: bool | None = None
    """Begin the text (and log-probabilities) with the prompt."""
    logprobs: int | None = None
    """Report log-probabilities, with this many most likely tokens at each position (0 to 20)."""
    best_of: int | None = None
    """Must equal ``n``: choosing among more candidates is not supported."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add special tokens around the prompt. Default true."""

    suffix: Annotated[Any, Neutral("")] = None


class AdapterLoadRequest(Wire):
    """Body of POST /v1/adapters."""

    name: str
    """Name under which the adapter will be served; a loaded adapter of that name is replaced."""
    source: str
    """Folder on the server, URL, or hub id, as far as the operator allows."""
    tenant: str | None = None
    """Whose adapter it becomes, if an administrator loads it; without it, the operator's, which everybody may use."""


class AdapterPinRequest(Wire):
    """Body of PATCH /v1/adapters/{name}."""

    pinned: bool
    """Whether the adapter stays in host memory whatever else is asked for."""


class TokenizeRequest(Wire):
    """Body of POST /tokenize: either ``prompt`` or ``messages``."""

    model: str | None = None
    """A name from /v1/models; all share one tokenizer."""
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages."""
    add_generation_prompt: bool | None = None
    """Default true."""
    chat_template_kwargs: TemplateVariables = None
    return_token_strs: bool | None = None
    """Also return each token as text."""


class DetokenizeRequest(Wire):
    """Body of POST /detokenize."""

    model: str | None = None
    """A name from /v1/models; all share one tokenizer."""
    tokens: TokenIds
    """Token ids; control tokens are kept in the text."""

"""Wire types of answers, OpenAI's shapes. Encoded by msgspec; the OpenAPI document is made from them.

The chunks of a stream are not here: they are put together from bytes in ``streaming``.
"""

import msgspec


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a whole request, all prompts and choices together; a prompt counts once, whatever ``n``."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """The chosen token at a position, and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatAnswer(msgspec.Struct, frozen=True):
    """The assistant's message."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer of a chat request."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    """The stop string or stop token id that ended the answer; null for the model's own end of sequence."""


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answer to POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    system_fingerprint: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a plain completion, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One text of a completion request."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    """The stop string or stop token id that ended the text; null for the model's own end of sequence."""


class Completion(msgspec.Struct, frozen=True):
    """Answer to POST /v1/completions."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: str = "text_completion"
    system_fingerprint: None = None


class ModelCard(msgspec.Struct, frozen=True):
    """One name that requests may use as ``model``."""

    id: str
    created: int
    max_model_len: int
    root: str
    """Digest of the adapter's weights and config; the base's own name."""
    parent: str | None
    """The base model of an adapter; null for the base."""
    object: str = "model"
    owned_by: str = "pomona"


class ModelList(msgspec.Struct, frozen=True):
    """Answer to GET /v1/models."""

    data: list[ModelCard]
    object: str = "list"


class AdapterCard(msgspec.Struct, frozen=True):
    """One adapter name and what is behind it."""

    name: str
    state: str
    """registered, fetching, verifying, staged, resident, draining, or failed."""
    version: int
    """Counts what was loaded under this name, from 1; 0 while the first is loading."""
    source: str
    id: str | None
    """Digest of weights and config; null while it is first loaded."""
    lora_rank: int | None
    num_pages: int | None
    num_host_bytes: int | None
    modules: list[str]
    features: list[str]
    num_requests: int
    """Requests in flight that use it."""
    created: int
    """Unix time of loading, or of the server's start."""
    pinned: bool
    num_waiting: int
    """Requests that wait for it to be brought in."""
    last_used: int | None
    """Unix time of the last request."""
    num_hits: int
    """Requests that found it in host memory."""
    num_misses: int
    num_loads: int
    """Times it was brought in."""
    num_failures: int
    num_evictions: int
    """Times it left host memory for others."""
    fetch_s: float
    """Seconds of the last load until its files were on this machine."""
    stage_s: float
    """Seconds after that until the engine had verified and converted them."""
    error: str | None
    """Why it could not be brought in last time."""
    retry_s: float | None
    """Seconds until it may be tried again."""
    object: str = "adapter"


class AdapterList(msgspec.Struct, frozen=True):
    """Answer to GET /v1/adapters: a page, by name."""

    data: list[AdapterCard]
    has_more: bool
    """True if there are more after the last one here."""
    object: str = "list"


class AdapterDeleted(msgspec.Struct, frozen=True):
    """Answer to DELETE /v1/adapters/{name}."""

    name: str
    deleted: bool = True
    object: str = "adapter.deleted"


class Tokenized(msgspec.Struct, frozen=True):
    """Answer to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct, frozen=True):
    """Answer to POST /detokenize."""

    prompt: str


class Health(msgspec.Struct, frozen=True):
    """Answer to GET /health and /ready."""

    status: str
    """ok or unavailable."""
    engine: str
    """The engine's state: ready, or what keeps it from that; without the reason on a server that asks for keys."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """Every error's body."""

    error: ErrorDetail

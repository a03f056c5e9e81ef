"""What a client asked for: immutable, complete, checked when built.

Token ids only: text, chat templates and stop *strings* belong to ``text`` and to whoever calls it.
"""

import enum
import math
from dataclasses import dataclass, field

from pomona.core.errors import InvalidRequestError
from pomona.core.ids import AdapterId, RequestId, TenantId

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: no other token has a chance worth drawing, and float32 has no room for more."""


class FinishReason(enum.StrEnum):
    """Why a request ended. Exactly one per accepted request."""

    STOP = "stop"
    """A stop token (or, above the engine, a stop string) was produced."""
    LENGTH = "length"
    """``max_tokens`` or the context's end was reached."""
    ABORT = "abort"
    """The client went away or an operator ended it."""
    FAIL = "fail"
    """Our fault: the executor failed or died."""


class Priority(enum.IntEnum):
    """How urgent a request is. A class gives way to those above it, within one step, and fills what they leave."""

    INTERACTIVE = 0
    """Somebody waits for the first token."""
    STANDARD = 1
    BATCH = 2
    """Nobody waits."""


def _check(ok: bool, field_name: str, value: object, allowed: str) -> None:  # noqa: FBT001
    if not ok:
        raise InvalidRequestError.out_of_range(field_name, value, allowed)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Every field is honoured by the engine, or the constructor refuses it.

    Raises:
        InvalidRequestError: a field is out of range (NaN and infinities included).
    """

    max_tokens: int = 16
    """Upper bound on output tokens, at least 1."""
    min_tokens: int = 0
    """Stop tokens are not chosen before this many output tokens."""
    temperature: float = 1.0
    """Below ``GREEDY_BELOW`` means greedy (the most likely token; ties go to the lowest id)."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to at least this, in (0, 1]; at least one token stays."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one, in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already in the output, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit per occurrence in the output, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output, in [0.01, 100]; 1 is off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value in [-100, 100]) pairs added to the logits."""
    seed: int = 0
    """Start of this request's own random stream; draw number i depends on (seed, i) alone."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output (the model's end-of-sequence ids included unless they are to be ignored)."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many most likely alternatives; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for each prompt token (the first has none); switches prefix-cache hits off for this request."""

    def __post_init__(self) -> None:
        """Check every range once, so that nothing below has to."""
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "between 0 and max_tokens")
        # Written so that NaN, for which every comparison is false, is refused too.
        _check(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "between 0 and 100")
        _check(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "greater than 0 and at most 1")
        _check(0 <= self.top_k < 2**63, "top_k", self.top_k, "0 (off) or positive, below 2^63")
        _check(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1")
        _check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, "between -2 and 2")
        _check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, "between -2 and 2")
        # What logits are divided by must not make them infinite.
        _check(
            0.01 <= self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            "between 0.01 and 100",
        )
        for token_id, bias in self.logit_bias:
            _check(token_id >= 0, "logit_bias", token_id, "a token id, 0 or larger")
            _check(-100.0 <= bias <= 100.0 and math.isfinite(bias), "logit_bias", bias, "between -100 and 100")
        _check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"between 0 and {MAX_SEED}")
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _check(value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"between 0 and {MAX_LOGPROBS}")

    @property
    def has_penalties(self) -> bool:
        """True when the logits depend on the tokens produced so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What a tenant may expect of the scheduler, said with each of its requests; the latest one counts.

    Raises:
        InvalidRequestError: a field is out of range (NaN and infinities included).
    """

    priority: Priority = Priority.STANDARD
    weight: float = 1.0
    """The tenant's share, relative to those of others; honoured by the policies that weigh tenants."""
    ttft_s: float | None = None
    """Target for the time to first token: a request that would miss it is refused when it comes; None has none."""
    tpot_s: float | None = None
    """Target for the time per output token: steps with such a request are planned to be no longer; None has none."""

    def __post_init__(self) -> None:
        """Check every range once."""
        _check(0.0 < self.weight < math.inf, "weight", self.weight, "a positive number")
        for name, value in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            _check(value is None or 0.0 < value < math.inf, name, value, "a positive number")


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request, as the scheduler sees it. Immutable; progress lives in ``sched.Sequence``."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float
    """Monotonic clock of this machine (or virtual time), seconds."""
    tenant_id: TenantId = field(default=TenantId("default"))
    adapter_id: AdapterId | None = None
    """None asks for the base model alone."""
    cache_salt: bytes = b""
    """Server-side secret of the tenant: prefix-cache blocks are shared only between equal salts."""
    service_level: ServiceLevel = ServiceLevel()

    def __post_init__(self) -> None:
        """An empty prompt has nothing to compute; the edge refuses it with a clearer message."""
        if not self.prompt_token_ids:
            raise InvalidRequestError("prompt", "prompt is empty: at least one token is needed")

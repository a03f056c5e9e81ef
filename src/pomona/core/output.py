"""What goes back up from the engine: token ids and a finish reason, no text."""

from dataclasses import dataclass

from pomona.core.ids import RequestId
from pomona.core.plan import TokenLogprobs
from pomona.core.request import FinishReason


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of one request after one step. Exactly one output has a ``finish_reason``, and it is the last."""

    request_id: RequestId
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per new token if asked for, else empty."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Those of prompt tokens computed since the last output, in order."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token that ended the output (it is the last of ``new_token_ids``), if one did."""
    error: str | None = None
    """With FinishReason.FAIL: what went wrong, fit to show to the client."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache when the request was first scheduled."""
    first_scheduled_s: float | None = None
    """Engine clock when the request was first scheduled; queue time is this minus arrival."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot after a step: gauges as they are, counters since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    num_kv_blocks: int = 0
    """KV's own, and those of adapter pages lent to it."""
    num_kv_blocks_used: int = 0
    """Referenced by a running sequence; cached blocks that nobody uses count as free."""
    num_adapter_pages: int = 0
    num_adapter_pages_used: int = 0
    """Of resident adapters."""
    num_adapter_pages_lent: int = 0
    """Of which KV has the memory, as blocks."""
    num_resident_adapters: int = 0
    num_pinned_adapters: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens computed (prefix hits excluded, recomputation included)."""
    num_output_tokens: int = 0
    num_prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    num_prefix_hits: int = 0
    """Prompt tokens found there."""
    num_adapter_loads: int = 0
    num_adapter_evictions: int = 0

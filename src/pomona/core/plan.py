"""What scheduler and executor exchange: a StepPlan goes down, a StepResult comes back.

Both are complete when built and never changed. Time, tensors and text do not appear in them, so the simulator's
executor and the real one take exactly the same plans.
"""

from dataclasses import dataclass, field

from pomona.core.ids import AdapterId, BlockId, PageId, RequestId
from pomona.core.request import SamplingParams


@dataclass(frozen=True, slots=True)
class SeqStart:
    """All an executor must know of a sequence it does not hold: sent when the sequence is first scheduled, and again
    when it comes back after preemption."""

    token_ids: tuple[int, ...]
    """Prompt, then the outputs so far (none unless the sequence was preempted)."""
    num_prompt_tokens: int
    sampling: SamplingParams
    adapter_id: AdapterId | None


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """One sequence's part of a step: compute tokens [num_computed_tokens, num_computed_tokens + num_scheduled_tokens).

    A decode is one scheduled token, a prompt chunk is several; nothing else tells them apart.
    """

    request_id: RequestId
    num_computed_tokens: int
    """Tokens whose KV exists before this step (prefix-cache hits included)."""
    num_scheduled_tokens: int
    is_sampled: bool
    """True when the last known token is computed in this step, so that the step yields the next one."""
    new_block_ids: tuple[BlockId, ...] = ()
    """Appended to the sequence's block table before the step; with ``start``, the whole table."""
    start: SeqStart | None = None


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Copy a staged adapter into these pages."""

    adapter_id: AdapterId
    page_ids: tuple[PageId, ...]
    load_id: int = 0
    """Which load this is: an adapter may be evicted and loaded again. Ascending."""
    is_awaited: bool = True
    """The copy is made before the step runs. Otherwise it runs beside this step and later ones: until it has been made,
    sequences of the adapter may compute prompt tokens, from the host copy."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one step does, in order: release, evict, load, then compute."""

    step_id: int
    seqs: tuple[ScheduledSeq, ...]
    """Sequences of equal adapter stand next to each other, so that each adapter is one segment of rows. May be empty:
    then the executor is only told what to forget."""
    released: tuple[RequestId, ...] = ()
    """Sequences the executor held that it must forget: finished, aborted or preempted. After a step that raised, or a
    restart, there may be some that it never held, or no longer does: it ignores those."""
    adapter_evictions: tuple[AdapterId, ...] = ()
    """Adapters whose pages may be overwritten from this step on, by other adapters and as KV blocks. After a failure
    there may be some that the executor does not hold, likewise."""
    adapter_loads: tuple[AdapterLoad, ...] = ()

    @property
    def num_scheduled_tokens(self) -> int:
        """Rows of the step's batch."""
        return sum(seq.num_scheduled_tokens for seq in self.seqs)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the raw logits (before penalties, bias and temperature)."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token of the vocabulary."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced."""

    step_id: int
    sampled: dict[RequestId, int] = field(default_factory=dict)
    """The next token of every sequence with ``is_sampled``, except failed ones."""
    logprobs: dict[RequestId, TokenLogprobs] = field(default_factory=dict)
    """For sequences that asked for them."""
    prompt_logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    """For prompt tokens [num_computed + 1, num_computed + num_scheduled], as far as they are prompt tokens: a chunk's
    logits describe the tokens after it."""
    failed: dict[RequestId, str] = field(default_factory=dict)
    """Sequences that cannot go on (for example logits that are not finite), with the reason."""
    loading: frozenset[int] = frozenset()
    """Loads, of this plan and earlier ones, whose copies have not been made yet."""
    failed_loads: frozenset[int] = frozenset()
    """Loads, of this plan and earlier ones, that failed, each told once: what sequences computed with them is worth
    nothing."""

"""A request's mutable progress on one replica. Owned and written by the scheduler; nothing here decides anything."""

import enum

from pomona.core.ids import BlockId, RequestId
from pomona.core.plan import ScheduledSeq, SeqStart
from pomona.core.request import Request
from pomona.sched.account import Account


class SequenceState(enum.Enum):
    """Where a sequence is; prefill and decode are not states but how many tokens are left to compute."""

    WAITING = enum.auto()
    """In the queue: new, or preempted."""
    RUNNING = enum.auto()
    """Holds blocks and, with an adapter, a pin; the executor holds it too."""
    ENDED = enum.auto()
    """Its terminal output has been made; it holds nothing."""


class Sequence:
    """Tokens known, tokens computed, blocks held.

    Args:
        request: what was asked.
        max_model_len: context in tokens.
    """

    # Read and written for every sequence in every step, hence slots and plain attributes.
    __slots__ = (
        "account",
        "adapter_order",
        "admission_order",
        "block_ids",
        "block_keys",
        "first_blocked_s",
        "first_scheduled_s",
        "key_namespace",
        "max_tokens_total",
        "min_tokens_total",
        "next_publish_tokens",
        "num_cached_tokens",
        "num_charged_tokens",
        "num_computed_tokens",
        "num_loaded_pages",
        "num_pending_tokens",
        "num_prompt_logprobs_sent",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_slots",
        "output_charge",
        "output_charge_step",
        "prefix_leader",
        "request",
        "request_id",
        "scheduled",
        "state",
        "stop_token_ids",
        "token_ids",
        "weight",
    )

    def __init__(self, request: Request, max_model_len: int) -> None:
        self.request = request
        self.request_id: RequestId = request.request_id
        self.state = SequenceState.WAITING
        self.token_ids: list[int] = list(request.prompt_token_ids)
        """Prompt, then outputs."""
        self.num_prompt_tokens = len(self.token_ids)
        self.max_tokens_total = min(self.num_prompt_tokens + request.sampling.max_tokens, max_model_len)
        """Known tokens at which it ends with LENGTH."""
        self.min_tokens_total = self.num_prompt_tokens + request.sampling.min_tokens
        """A stop token ends it only after this many known tokens."""
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self.num_computed_tokens = 0
        """Tokens whose KV exists once every step planned so far has been carried out."""
        self.num_pending_tokens = 0
        """Tokens that planned steps sample and whose results are outstanding: 0 or 1, or 2 if a step was planned
        ahead."""
        self.scheduled: ScheduledSeq
        """Its part of the latest plan it was in; unset before the first."""
        self.block_ids: list[BlockId] = []
        self.num_slots = 0
        """KV slots of ``block_ids``: tokens that fit without another block."""
        self.block_keys: list[bytes] = []
        """Prefix-cache keys of its first full blocks, as far as they were needed."""
        self.key_namespace = b""
        """What every key of this sequence starts from; set by the prefix cache."""
        self.num_published_blocks = 0
        """First blocks that need no publishing while it runs: found in the cache, or published."""
        self.next_publish_tokens = 0
        """Computed tokens at which the next block is full."""
        self.prefix_leader: Sequence | None = None
        """The sequence whose prefix this one waits, or has waited, to share; None once it runs."""
        self.adapter_order = 0
        """Place of its adapter's rows among the adapters of a batch; 0 for the base model."""
        self.first_scheduled_s: float | None = None
        self.first_blocked_s: float | None = None
        """When it was first passed over for want of adapter pages; None when that is not what it waits for."""
        self.num_loaded_pages = 0
        """Adapter pages that were loaded for it."""
        self.num_cached_tokens = 0
        self.num_prompt_logprobs_sent = 0
        self.account: Account
        """Whom its service is charged to; set by the queue."""
        self.admission_order = 0
        """Its place among all admissions, the latest of its own."""
        self.num_charged_tokens = self.num_prompt_tokens
        """Known tokens that were charged for when it was admitted; further ones are charged as they come."""
        self.output_charge = 0.0
        """Charge for the next output token that has not been charged for."""
        self.output_charge_step = 0.0
        """By how much more each output token is charged than the one before it."""
        self.weight = 1.0
        """Its account's when it was admitted: all that it is charged is divided by it, and what is given back too."""

    @property
    def was_admitted(self) -> bool:
        """True once it has been scheduled, even if it was preempted since."""
        return self.first_scheduled_s is not None

    @property
    def will_grow(self) -> bool:
        """True when its next token, if it does not end before, needs another block."""
        return self.num_slots < len(self.token_ids) + self.num_pending_tokens < self.max_tokens_total

    def start(self) -> SeqStart:
        """What an executor that does not hold the sequence must be told."""
        return SeqStart(
            token_ids=tuple(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.request.sampling,
            adapter_id=self.request.adapter_id,
        )

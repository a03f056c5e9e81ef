"""Settings of one replica's scheduler. Built by the composition root, which fills in what the runner found at start-up
(``num_kv_blocks``, ``num_adapter_pages``, ``blocks_per_page``, ``vocab_size``); never read from files or the
environment here.
"""

import math
from dataclasses import dataclass, field
from typing import get_args

from pomona.core.errors import ConfigError
from pomona.sched.adapter_arrivals import AdapterLoading
from pomona.sched.fairness import FairnessConfig

_AT_LEAST_ONE = ("vocab_size", "max_num_batched_tokens", "max_num_seqs", "max_waiting", "block_size", "num_kv_blocks")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and switches of one scheduler.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    num_kv_blocks: int
    """KV blocks on the device that are never an adapter's, as the runner sized them."""
    max_model_len: int
    """Context in tokens: prompt and output of one sequence together."""
    vocab_size: int = 2**31
    """Token ids are below this: what the model has, or if there is no model, what an int32 holds."""
    num_adapter_pages: int = 0
    """Adapter pages on the device; 0 serves the base model alone."""
    blocks_per_page: int = 0
    """KV blocks in the place of which an adapter page stands: KV borrows pages that no adapter needs. 0: pages have
    memory of their own, which KV never uses."""
    block_size: int = 16
    """Token positions of one KV block."""
    max_num_batched_tokens: int = 2048
    """Token budget: prompt and decode tokens computed in one step, over all sequences."""
    max_num_seqs: int = 256
    """Sequences that may run at once."""
    max_prefill_chunk: int | None = None
    """Most prompt tokens of one sequence in one step; None leaves it to the token budget."""
    max_waiting: int = 1024
    """Requests that may wait, preempted ones included; one more is rejected."""
    enable_prefix_cache: bool = True
    """Share the KV of equal prefixes (of equal adapter and tenant salt)."""
    min_prefix_wait_tokens: int = 64
    """A new sequence waits while a running one computes at least this many tokens that both begin with, in order to
    share them; 0 never waits."""
    reserve_steps: int = 8
    """A sequence is admitted only if the blocks left are enough for the running ones to decode this many steps, so that
    it is not preempted at once; 0 fills the pool."""
    adapter_wait_limit_s: float = 2.0
    """A request that has waited this long for adapter pages gets them next: until then nobody else gets pages, and the
    adapters that will be given up for it take no new users."""
    adapter_loading: AdapterLoading = "on_demand"
    """How adapters come to the device: the step waits for the copy, the request joins when it has been made, or its
    prompt is computed from the host copy meanwhile."""
    fairness: FairnessConfig = field(default=FairnessConfig())
    """How service is divided between tenants."""
    max_step_s: float | None = None
    """Steps hold no more than is expected to be computed in this many seconds, as far as steps so far tell; None holds
    them to the token budget alone."""

    def __post_init__(self) -> None:
        """Check every range once."""
        for name in _AT_LEAST_ONE:
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("num_adapter_pages", self.num_adapter_pages, 0)
        _check_at_least("blocks_per_page", self.blocks_per_page, 0)
        _check_at_least("min_prefix_wait_tokens", self.min_prefix_wait_tokens, 0)
        _check_at_least("reserve_steps", self.reserve_steps, 0)
        _check_at_least("max_model_len", self.max_model_len, 2)
        if self.max_prefill_chunk is not None:
            _check_at_least("max_prefill_chunk", self.max_prefill_chunk, 1)
        if self.adapter_loading not in get_args(AdapterLoading):
            raise ConfigError(f"adapter_loading is {self.adapter_loading!r}: must be on_demand, join or assist")
        if not 0.0 <= self.adapter_wait_limit_s < math.inf:
            raise ConfigError(f"adapter_wait_limit_s is {self.adapter_wait_limit_s}: must be finite and at least 0")
        if self.max_step_s is not None and not 0.0 < self.max_step_s < math.inf:
            raise ConfigError(f"max_step_s is {self.max_step_s}: must be a positive number")

    def num_reserved_blocks(self, num_running: int) -> int:
        """Blocks that so many running sequences keep to grow into when another one is admitted."""
        return -(-num_running * self.reserve_steps // self.block_size)

    @property
    def max_lead(self) -> float:
        """Service that a tenant may be ahead of one that waits: as set, or what the KV cache can hold (M of the VTC
        paper), at the price of its dearest tokens. With ``drr`` at least the quantum: with less, whoever's turn began
        would preempt those before it, for ever."""
        fairness = self.fairness
        num_slots = self.num_kv_blocks * self.block_size
        prices = fairness.prices
        per_token = max(
            prices.per_input_token, prices.outputs(self.max_model_len, self.max_model_len - 1, self.max_model_len)
        )
        max_lead = per_token * num_slots if fairness.max_lead is None else fairness.max_lead
        return max(max_lead, fairness.quantum) if fairness.policy == "drr" else max_lead

    @property
    def service_bound(self) -> float:
        """Service, divided by weight, that a tenant may get more than another of its class while both have requests
        waiting; for weights of at least 1, without charges for pages held, and up to what is predicted in advance.
        Proved in docs/design/0011-fairness.md."""
        prices = self.fairness.prices
        longest = self.max_model_len - 1
        admission = prices.admission(longest, 0) + prices.per_page_loaded * self.num_adapter_pages
        step = self.max_num_seqs * prices.outputs(longest, longest, longest + 1)
        return 2.0 * (self.max_lead + max(admission, step))


def _check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{name} is {value}: must be at least {minimum}")

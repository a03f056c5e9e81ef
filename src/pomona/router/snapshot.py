"""What the router knows of a request and of a replica. Values only: who keeps them up to date is ``fleet.Fleet``, who
decides with them is a policy.
"""

from dataclasses import dataclass

from pomona.core.ids import AdapterId, ReplicaId


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """The part of a request that routing depends on."""

    num_prompt_tokens: int
    num_kv_tokens: int
    """KV slots it is expected to fill: its prompt, and as much of its output as the caller wants counted."""
    adapter_id: AdapterId | None = None
    lora_rank: int = 0
    """0 for the base model alone."""
    prefix_keys: tuple[bytes, ...] = ()
    """Keys of the prompt's leading runs of ``AffinityConfig.prefix_tokens`` tokens, shortest prefix first."""
    num_adapter_rows: int = 0
    """Rank rows of the pages that the adapter takes: its rank, or more if that does not fill them."""
    num_page_kv_tokens: int = 0
    """KV slots that those pages are lent as while nobody needs the adapter."""


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """A replica at one moment, as it reports itself."""

    replica_id: ReplicaId
    num_running: int = 0
    num_waiting: int = 0
    num_kv_tokens: int = 0
    """KV slots of the replica, adapter pages that it may be lent included."""
    num_free_kv_tokens: int = 0
    lora_ranks: tuple[int, ...] = ()
    """Rank of every running and waiting request's adapter, in any order; 0 for the base model alone."""
    resident_adapters: tuple[tuple[AdapterId, int], ...] = ()
    """(adapter, rank rows it holds), least recently used first."""
    num_adapter_rows: int = 0
    """Rank rows the replica has room for."""
    prefix_keys: tuple[bytes, ...] = ()
    """Prefixes whose KV it holds (see ``RouteRequest.prefix_keys``), least recently used first."""


class ReplicaState:
    """A replica as the router believes it to be now; written by ``Fleet`` only."""

    __slots__ = (
        "adapter_counts",
        "max_lora_rank",
        "num_free_kv_tokens",
        "num_requests",
        "rank_counts",
        "replica_id",
        "sum_lora_ranks",
    )

    def __init__(self, replica_id: ReplicaId) -> None:
        self.replica_id = replica_id
        self.num_requests = 0
        """Its load: requests sent to it that have not ended."""
        self.num_free_kv_tokens = 0
        self.sum_lora_ranks = 0
        self.max_lora_rank = 0
        self.rank_counts: dict[int, int] = {}
        """Rank -> requests with an adapter of that rank; no zero counts."""
        self.adapter_counts: dict[AdapterId, int] = {}
        """Adapter whose pages could be lent -> requests that were sent with it; no zero counts."""

    def take_kv(self, request: RouteRequest) -> None:
        """Count the KV of one more request, and its adapter's pages if it is the first that needs them."""
        self.num_free_kv_tokens -= request.num_kv_tokens
        if request.num_page_kv_tokens and request.adapter_id is not None:
            num_users = self.adapter_counts.get(request.adapter_id, 0)
            self.adapter_counts[request.adapter_id] = num_users + 1
            if not num_users:
                self.num_free_kv_tokens -= request.num_page_kv_tokens

    def give_kv(self, request: RouteRequest) -> None:
        """Count the KV of one request less, and its adapter's pages if it was the last that needed them."""
        self.num_free_kv_tokens += request.num_kv_tokens
        if request.num_page_kv_tokens and request.adapter_id is not None:
            num_users = self.adapter_counts.pop(request.adapter_id, 0)  # 0: it was sent before the last report
            if num_users > 1:
                self.adapter_counts[request.adapter_id] = num_users - 1
            elif num_users:
                self.num_free_kv_tokens += request.num_page_kv_tokens

    def add_rank(self, lora_rank: int) -> None:
        """Count one more request of this rank."""
        self.rank_counts[lora_rank] = self.rank_counts.get(lora_rank, 0) + 1
        self.sum_lora_ranks += lora_rank
        if lora_rank > self.max_lora_rank:
            self.max_lora_rank = lora_rank

    def remove_rank(self, lora_rank: int) -> None:
        """Count one request of this rank less."""
        num_left = self.rank_counts[lora_rank] - 1
        self.sum_lora_ranks -= lora_rank
        if num_left:
            self.rank_counts[lora_rank] = num_left
            return
        del self.rank_counts[lora_rank]
        if lora_rank == self.max_lora_rank:
            self.max_lora_rank = max(self.rank_counts, default=0)

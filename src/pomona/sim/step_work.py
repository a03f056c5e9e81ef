"""StepWork: how much a step has to do, in the numbers that cost models are functions of.

``WorkMeter`` follows the plans of one replica, whoever carries them out: the simulator, or the tensor runner that a
profile is taken of. So a cost is fitted to exactly what it is later asked for.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from pomona.core.ids import AdapterId, RequestId
from pomona.core.plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step. Rows are scheduled tokens; the context of a sequence is what has KV after the step."""

    num_seqs: int = 0
    num_rows: int = 0
    num_decode_rows: int = 0
    """Rows of sequences that compute one token."""
    num_sampled: int = 0
    """Rows that yield a token, and so pass the output layer."""
    num_decode_kv_tokens: int = 0
    """Contexts of the decode rows, summed: KV positions that each is read for one row."""
    num_prefill_kv_tokens: int = 0
    """Contexts of the other sequences, summed."""
    num_prefill_pairs: int = 0
    """(query, key) pairs of causal attention in the other sequences."""
    num_adapter_rows: int = 0
    """Rows with an adapter."""
    num_adapters: int = 0
    """Distinct adapters of the batch."""
    sum_row_ranks: int = 0
    """Rank of each row's adapter, summed over rows: Punica's and CaraServe's cost of computing."""
    sum_adapter_ranks: int = 0
    """Rank summed over distinct adapters: what must be read."""
    max_rank: int = 0
    """Largest rank of the batch: what padding kernels pay for every row."""
    num_extra_adapters: int = 0
    """Distinct adapters with more than low-rank parts (DoRA, saved modules, biases, ...)."""
    has_extras: int = 0
    """1 if there are any such."""
    num_new_mix_adapters: int = 0
    """Distinct adapters, if they are not those of the last step that had any, in the same order: a runner prepares
    anew what depends on which adapters meet."""
    is_new_mix: int = 0
    """1 if so."""
    is_back_to_decodes: int = 0
    """1 if it has decode rows only and the last step had others, which have driven out of the caches what decodes
    read."""
    is_afresh: int = 0
    """1 if no sequence goes on from the last step: the replica has most likely been idle."""
    num_loads: int = 0
    """Adapters copied to the device before the step."""
    num_loaded_pages: int = 0

    @property
    def num_prefill_rows(self) -> int:
        """Rows of sequences that compute several tokens."""
        return self.num_rows - self.num_decode_rows

    @property
    def num_kv_tokens(self) -> int:
        """KV positions read or written."""
        return self.num_decode_kv_tokens + self.num_prefill_kv_tokens

    @property
    def padded_row_ranks(self) -> int:
        """Rows with an adapter times the largest rank: CaraServe's cost of kernels that pad (BGMV)."""
        return self.num_adapter_rows * self.max_rank


class WorkMeter:
    """Follows one replica's plans, in order.

    Args:
        lora_ranks: largest rank of every adapter that a plan may name; may grow later.
        with_extras: those of them that have more than low-rank parts; may grow later.
    """

    def __init__(self, lora_ranks: Mapping[AdapterId, int], with_extras: Container[AdapterId] = ()) -> None:
        self._lora_ranks = lora_ranks
        self._with_extras = with_extras
        self._mix: tuple[AdapterId, ...] = ()
        self._had_prefill_rows = False
        self._adapter_of: dict[RequestId, AdapterId | None] = {}

    def measure(self, plan: StepPlan) -> StepWork:
        """The work of the next plan."""
        adapter_of = self._adapter_of
        for request_id in plan.released:
            adapter_of.pop(request_id, None)
        is_afresh = not adapter_of
        num_rows = num_decode_rows = num_sampled = 0
        num_decode_kv_tokens = num_prefill_kv_tokens = num_prefill_pairs = 0
        rows_of: dict[AdapterId, int] = {}
        for seq in plan.seqs:
            num_new = seq.num_scheduled_tokens
            if seq.start is not None:
                adapter_of[seq.request_id] = seq.start.adapter_id
            context = seq.num_computed_tokens + num_new
            num_rows += num_new
            num_sampled += seq.is_sampled
            if num_new == 1:
                num_decode_rows += 1
                num_decode_kv_tokens += context
            else:
                num_prefill_kv_tokens += context
                num_prefill_pairs += num_new * context - num_new * (num_new - 1) // 2
            adapter_id = adapter_of[seq.request_id]
            if adapter_id is not None:
                rows_of[adapter_id] = rows_of.get(adapter_id, 0) + num_new
        mix = tuple(rows_of)
        is_new_mix = bool(mix) and mix != self._mix
        self._mix = mix or self._mix
        is_back_to_decodes = self._had_prefill_rows and num_rows == num_decode_rows > 0
        if num_rows:
            self._had_prefill_rows = num_rows > num_decode_rows
        num_extra = sum(adapter_id in self._with_extras for adapter_id in mix)
        ranks = [(rows, self._lora_ranks[adapter_id]) for adapter_id, rows in rows_of.items()]
        return StepWork(
            num_seqs=len(plan.seqs),
            num_rows=num_rows,
            num_decode_rows=num_decode_rows,
            num_sampled=num_sampled,
            num_decode_kv_tokens=num_decode_kv_tokens,
            num_prefill_kv_tokens=num_prefill_kv_tokens,
            num_prefill_pairs=num_prefill_pairs,
            num_adapter_rows=sum(rows_of.values()),
            num_adapters=len(rows_of),
            sum_row_ranks=sum(rows * lora_rank for rows, lora_rank in ranks),
            sum_adapter_ranks=sum(lora_rank for _, lora_rank in ranks),
            max_rank=max((lora_rank for _, lora_rank in ranks), default=0),
            num_extra_adapters=num_extra,
            has_extras=int(num_extra > 0),
            num_new_mix_adapters=len(mix) if is_new_mix else 0,
            is_new_mix=int(is_new_mix),
            is_back_to_decodes=int(is_back_to_decodes),
            is_afresh=int(is_afresh and num_rows > 0),
            num_loads=len(plan.adapter_loads),
            num_loaded_pages=sum(len(load.page_ids) for load in plan.adapter_loads),
        )

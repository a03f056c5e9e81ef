"""A plan becomes the arrays that one forward pass needs: ``gather`` on the host, ``to_device`` from there.

Vectorised over rows. Rows are tokens, in plan order: all scheduled tokens of the first sequence, then of the second,
and so on. A token that the step before samples, and that has not come back, is filled in on the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.core.ids import AdapterId
from pomona.core.plan import StepPlan
from pomona.kernels.attention import AttentionBatch
from pomona.kernels.copies import upload
from pomona.runner.sequences import SequenceTable


@dataclass(frozen=True)
class AdapterRun:
    """A run of consecutive rows that use one adapter."""

    adapter_id: AdapterId
    start: int
    end: int
    sampled_start: int
    """The same run among the sampled rows."""
    sampled_end: int


@dataclass(frozen=True)
class HostBatch:
    """One step's inputs on the host."""

    token_ids: NDArray[np.int64]
    """[num_tokens]; those at ``pending_rows`` mean nothing."""
    positions: NDArray[np.int64]
    """[num_tokens]."""
    slots: NDArray[np.int64]
    """[num_tokens]: KV slot of each row."""
    query_lens: NDArray[np.int64]
    """[num_seqs]."""
    context_lens: NDArray[np.int64]
    """[num_seqs], this step's tokens included."""
    query_starts: NDArray[np.int64]
    """[num_seqs + 1]."""
    block_tables: NDArray[np.int32]
    """[num_seqs, blocks of the longest context]."""
    table_rows: NDArray[np.int64]
    """[num_seqs]: row of each sequence in the SequenceTable."""
    sampled_seqs: NDArray[np.int64]
    """Indices of the sequences that yield a token."""
    pending_rows: NDArray[np.int64]
    """Rows whose token is the latest of their sequence and has not come back."""
    pending_sources: NDArray[np.int64]
    """Their places among the tokens that the step before sampled."""
    adapter_runs: tuple[AdapterRun, ...]

    @property
    def is_decode(self) -> bool:
        """True if every sequence has one row, which yields a token."""
        return len(self.token_ids) == len(self.table_rows) == len(self.sampled_seqs)


@dataclass(frozen=True)
class DeviceBatch:
    """One step's inputs on the device."""

    token_ids: Tensor
    """int64 [num_tokens]."""
    positions: Tensor
    """int64 [num_tokens]."""
    attention: AttentionBatch
    sampled_rows: Tensor
    """int64 [num_sampled]: last rows of the sequences that yield a token."""


def gather(plan: StepPlan, table: SequenceTable, block_size: int) -> HostBatch:
    """Update the table from the plan and gather the step's inputs from it.

    Args:
        plan: at least one sequence.
        table: changed in place: new sequences, new blocks.
        block_size: token positions per KV block.
    """
    num_seqs = len(plan.seqs)
    table_rows = np.fromiter((table.update(seq) for seq in plan.seqs), dtype=np.int64, count=num_seqs)
    query_lens = np.fromiter((seq.num_scheduled_tokens for seq in plan.seqs), dtype=np.int64, count=num_seqs)
    computed = np.fromiter((seq.num_computed_tokens for seq in plan.seqs), dtype=np.int64, count=num_seqs)
    is_sampled = np.fromiter((seq.is_sampled for seq in plan.seqs), dtype=np.bool_, count=num_seqs)

    query_starts = np.zeros(num_seqs + 1, dtype=np.int64)
    np.cumsum(query_lens, out=query_starts[1:])
    num_tokens = int(query_starts[-1])
    rows = np.repeat(table_rows, query_lens)
    positions = np.arange(num_tokens) + np.repeat(computed - query_starts[:-1], query_lens)
    slots = table.block_table[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    context_lens = computed + query_lens
    max_blocks = -(-int(context_lens.max()) // block_size)
    pending_rows = np.flatnonzero(positions >= table.num_host_tokens[rows])
    return HostBatch(
        token_ids=table.token_ids[rows, positions],
        positions=positions,
        slots=slots,
        query_lens=query_lens,
        context_lens=context_lens,
        query_starts=query_starts,
        block_tables=table.block_table[table_rows, :max_blocks],
        table_rows=table_rows,
        sampled_seqs=np.flatnonzero(is_sampled),
        pending_rows=pending_rows,
        pending_sources=table.sampled_index[rows[pending_rows]],
        adapter_runs=_adapter_runs([table.adapter_ids[row] for row in table_rows], query_starts, is_sampled),
    )


def to_device(batch: HostBatch, device: torch.device, latest: Tensor | None) -> DeviceBatch:
    """Copy a step's inputs to the device.

    Args:
        batch: what ``gather`` made.
        device: where the tensors go.
        latest: int64, the tokens that the step before sampled; needed if some are pending.
    """
    token_ids = upload(batch.token_ids, device)
    fill_pending(token_ids, batch, latest)
    return DeviceBatch(
        token_ids=token_ids,
        positions=upload(batch.positions, device),
        attention=AttentionBatch(
            query_starts=upload(batch.query_starts.astype(np.int32), device),
            context_lens=upload(batch.context_lens.astype(np.int32), device),
            block_tables=upload(batch.block_tables, device),
            slot_mapping=upload(batch.slots, device),
            host_query_lens=tuple(batch.query_lens.tolist()),
            host_context_lens=tuple(batch.context_lens.tolist()),
        ),
        sampled_rows=upload(batch.query_starts[1:][batch.sampled_seqs] - 1, device),
    )


def fill_pending(token_ids: Tensor, batch: HostBatch, latest: Tensor | None) -> None:
    """Write the tokens that have not come back into ``token_ids`` [at least num_tokens], on the device."""
    if batch.pending_rows.size:
        assert latest is not None, "a token is pending but no step was launched before"
        device = token_ids.device
        found = latest.index_select(0, upload(batch.pending_sources, device))
        token_ids.index_copy_(0, upload(batch.pending_rows, device), found)


def _adapter_runs(
    adapter_ids: list[AdapterId | None], query_starts: NDArray[np.int64], is_sampled: NDArray[np.bool_]
) -> tuple[AdapterRun, ...]:
    """Join neighbouring sequences of equal adapter. An adapter that appears in two places makes two runs."""
    sampled_before = np.zeros(len(adapter_ids) + 1, dtype=np.int64)
    np.cumsum(is_sampled, out=sampled_before[1:])
    runs: list[AdapterRun] = []
    first = 0
    for index in range(1, len(adapter_ids) + 1):
        if index < len(adapter_ids) and adapter_ids[index] == adapter_ids[first]:
            continue
        adapter_id = adapter_ids[first]
        if adapter_id is not None:
            runs.append(
                AdapterRun(
                    adapter_id=adapter_id,
                    start=int(query_starts[first]),
                    end=int(query_starts[index]),
                    sampled_start=int(sampled_before[first]),
                    sampled_end=int(sampled_before[index]),
                )
            )
        first = index
    return tuple(runs)

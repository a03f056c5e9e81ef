"""build_batch: a plan becomes the arrays that one forward pass needs. Vectorised over rows; host-side only.

Rows are tokens, in plan order: all scheduled tokens of the first sequence, then of the second, and so on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.core.ids import AdapterId
from pomona.core.plan import StepPlan
from pomona.kernels.attention import AttentionBatch
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
class DeviceBatch:
    """One step's inputs."""

    token_ids: Tensor
    """int64 [num_tokens]."""
    positions: Tensor
    """int64 [num_tokens]."""
    attention: AttentionBatch
    adapter_runs: tuple[AdapterRun, ...]
    table_rows: NDArray[np.int64]
    """[num_seqs]: row of each sequence in the SequenceTable."""
    query_starts: NDArray[np.int64]
    """[num_seqs + 1]."""
    sampled_seqs: NDArray[np.int64]
    """Indices of the sequences that yield a token."""
    sampled_rows: Tensor
    """int64 [num_sampled]: their last rows."""


def build_batch(plan: StepPlan, table: SequenceTable, block_size: int, device: torch.device) -> DeviceBatch:
    """Update the table from the plan and gather the step's inputs from it.

    Args:
        plan: at least one sequence.
        table: changed in place: new sequences, new blocks.
        block_size: token positions per KV block.
        device: where the tensors go.
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
    token_ids = table.token_ids[rows, positions]
    slots = table.block_table[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    context_lens = computed + query_lens
    max_blocks = -(-int(context_lens.max()) // block_size)
    sampled_seqs = np.flatnonzero(is_sampled)

    def to_device(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    attention = AttentionBatch(
        query_starts=to_device(query_starts.astype(np.int32)),
        context_lens=to_device(context_lens.astype(np.int32)),
        block_tables=to_device(table.block_table[table_rows, :max_blocks]),
        slot_mapping=to_device(slots),
        host_query_lens=tuple(query_lens.tolist()),
        host_context_lens=tuple(context_lens.tolist()),
    )
    return DeviceBatch(
        token_ids=to_device(token_ids),
        positions=to_device(positions),
        attention=attention,
        adapter_runs=_adapter_runs([table.adapter_ids[row] for row in table_rows], query_starts, is_sampled),
        table_rows=table_rows,
        query_starts=query_starts,
        sampled_seqs=sampled_seqs,
        sampled_rows=to_device(query_starts[1:][sampled_seqs] - 1),
    )


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

"""Cutting a step's segments into chunks of rows: once per step, on the host, from host numbers only.

However skewed the popularity of adapters, a chunk is at most ``rows_per_chunk`` rows of one segment, and that number
depends on the number of tokens alone.

For CUDA graphs: launch grids depend on the number of tokens, on ``LoraBatch.max_rank`` and on how many chunks the plan
has room for; never on which adapters there are, how many, or how their rows lie. ``reserve_plan`` before the capture
makes room for the worst batch of that many tokens; before each replay the runner copies the step's page tables, ranks
and scalings into the captured tensors and calls ``refresh_plan``. Unused chunks have no rows and end at once. A capture
needs ``max_rank`` and the widths of the page tables at the pool's largest, and host ranks that are not all 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.kernels.copies import upload
from pomona.kernels.lora import LoraBatch
from pomona.kernels.triton.configs import config_for

CHUNK_FIELDS = 4
"""Segment, first row, rows, unused: a chunk is 16 bytes."""


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """The chunks of one step."""

    chunks: Tensor
    """int32 [num_chunks, 4]; those past the step's own have no rows."""
    rows_per_chunk: int
    """A power of two: the kernels' tile of rows."""
    num_tokens: int


def rows_per_chunk(num_tokens: int, device: torch.device) -> int:
    """Rows that one program takes in a step of that many tokens."""
    return config_for("lora", device, num_tokens=num_tokens)["rows_per_chunk"]


def max_chunks(num_tokens: int, rows: int, max_segments: int | None = None) -> int:
    """Chunks of at most ``rows`` rows that any batch of ``num_tokens`` tokens can need.

    Args:
        num_tokens: rows of the batch.
        rows: rows per chunk.
        max_segments: most segments, if the caller can promise one; else every row may be a segment.
    """
    segments = num_tokens if max_segments is None else min(max_segments, num_tokens)
    # Each segment ends in at most one chunk that is not full.
    return min(num_tokens, (num_tokens - segments) // rows + segments)


def cut_segments(host_rows: Sequence[tuple[int, int]], rows: int) -> NDArray[np.int32]:
    """Chunks of all segments in row order, [num_chunks, 4].

    Args:
        host_rows: (start, end) per segment; an empty one gets no chunk.
        rows: rows per chunk.
    """
    bounds = np.array(host_rows, dtype=np.int32).reshape(-1, 2)
    counts = -(-(bounds[:, 1] - bounds[:, 0]) // rows)
    segments = np.repeat(np.arange(len(bounds)), counts)
    within = (np.arange(len(segments)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows
    chunks = np.zeros((len(segments), CHUNK_FIELDS), dtype=np.int32)
    chunks[:, 0] = segments
    chunks[:, 1] = bounds[segments, 0] + within
    chunks[:, 2] = np.minimum(bounds[segments, 1] - chunks[:, 1], rows)
    return chunks


def plan_of(batch: LoraBatch, num_tokens: int) -> ChunkPlan:
    """The batch's plan, made at its first use and kept with it."""
    device = batch.page_tables.device
    rows = rows_per_chunk(num_tokens, device)
    plan: ChunkPlan | None = batch.__dict__.get("_triton_plan")
    if plan is None or plan.rows_per_chunk != rows:
        assert batch.page_tables.dtype is torch.int32
        assert batch.page_tables.is_contiguous()
        chunks = upload(cut_segments(batch.host_rows, rows), device)
        plan = batch.__dict__["_triton_plan"] = ChunkPlan(chunks, rows, num_tokens)
    assert plan.num_tokens == num_tokens, "a batch has one number of tokens"
    return plan


def reserve_plan(batch: LoraBatch, num_tokens: int, max_segments: int | None = None) -> ChunkPlan:
    """Give a batch a plan with room for any segments, and fill in its own. For capture into a CUDA graph.

    Args:
        batch: its tensors are the ones that will be captured.
        num_tokens: rows of the batch, padding included.
        max_segments: see ``max_chunks``.
    """
    device = batch.page_tables.device
    rows = rows_per_chunk(num_tokens, device)
    shape = (max_chunks(num_tokens, rows, max_segments), CHUNK_FIELDS)
    plan = ChunkPlan(torch.zeros(shape, dtype=torch.int32, device=device), rows, num_tokens)
    batch.__dict__["_triton_plan"] = plan
    refresh_plan(plan, batch.host_rows)
    return plan


def refresh_plan(plan: ChunkPlan, host_rows: Sequence[tuple[int, int]]) -> None:
    """Fill a reserved plan with another step's segments, in place and in stream order.

    Args:
        plan: of ``reserve_plan``.
        host_rows: (start, end) per segment, within the plan's number of tokens.
    """
    chunks = np.zeros(plan.chunks.shape, dtype=np.int32)
    cut = cut_segments(host_rows, plan.rows_per_chunk)
    assert len(cut) <= len(chunks), f"{len(cut)} chunks, room for {len(chunks)}"
    assert not len(cut) or cut[-1, 1] + cut[-1, 2] <= plan.num_tokens
    chunks[: len(cut)] = cut
    plan.chunks.copy_(upload(chunks, plan.chunks.device))

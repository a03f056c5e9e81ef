"""Cutting a step's attention into items of similar size: once per step, on the host, from host numbers only.

A sequence's rows form blocks of as many rows as fit a tile; a block's KV is cut at multiples of ``split_tokens``, a
number that depends on the sequence alone, so neither does a row's result depend on what else is in the step. Sequences
fall into classes by how many rows they have (decodes, short chunks, prompts); each class is one launch.

For CUDA graphs over decodes: launch grids depend on how many items and merges the plan has room for. ``reserve_plan``
makes room for the worst case of so many sequences and KV tokens, ``refresh_plan`` fills in a step's own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.kernels.attention import AttentionBatch
from pomona.kernels.copies import upload
from pomona.kernels.triton.configs import Config, config_for

ITEM_FIELDS = 8
MERGE_FIELDS = 4

_UNSPLIT = np.iinfo(np.int32).max


@dataclass(frozen=True)
class HeadShape:
    """What the cutting depends on besides the batch."""

    group: int
    """Query heads per kv head."""
    head_dim: int
    element_bytes: int
    window: int | None

    def config(self, query_len: int, device: torch.device) -> Config:
        """The configuration for sequences of so many rows."""
        return config_for(
            "attention",
            device,
            query_lanes=query_len * self.group,
            head_dim=self.head_dim,
            element_bytes=self.element_bytes,
        )


@dataclass(frozen=True, eq=False)
class ClassPlan:
    """The launches of one class of sequences."""

    config: Config
    block_m: int
    """Lanes of a tile."""
    items: Tensor
    """int32 [num_items, 8], see ``attention_kernels``."""
    merges: Tensor
    """int32 [num_merges, 4]."""
    num_partials: int
    window: int | None
    num_lanes: int
    """Lanes that a partial has room for: most rows of a block that is split, times the group."""


def lanes_of(config: Config, group: int) -> int:
    """Lanes of a tile: the configured number, or what one row's group needs."""
    return max(config["block_m"], 1 << (group - 1).bit_length())


def cut_sequences(
    batch: AttentionBatch, seqs: NDArray[np.int64], rows_per_block: int, split_tokens: int, window: int | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Items and merges of some sequences.

    Args:
        batch: only its host numbers are read.
        seqs: int64 [num_seqs]: which sequences.
        rows_per_block: query rows per tile.
        split_tokens: KV positions per item at most; 0 for no cut.
        window: see ``kernels.attention``.

    Returns:
        items [num_items, 8] and merges [num_merges, 4]: blocks with more than one item.
    """
    query_lens = np.array(batch.host_query_lens, dtype=np.int64)
    first_rows = (np.cumsum(query_lens) - query_lens)[seqs]
    query_lens, context_lens = query_lens[seqs], np.array(batch.host_context_lens, dtype=np.int64)[seqs]
    num_blocks = -(-query_lens // rows_per_block)
    seq = np.repeat(np.arange(len(seqs)), num_blocks)
    within = _ranges(num_blocks) * rows_per_block
    num_rows = np.minimum(query_lens[seq] - within, rows_per_block)
    position = (context_lens - query_lens)[seq] + within
    kv_start = np.maximum(position - window + 1, 0) if window is not None else np.zeros_like(position)
    kv_end = position + num_rows

    split = split_tokens or _UNSPLIT
    first_split = kv_start // split
    num_splits = (kv_end - 1) // split - first_split + 1
    block = np.repeat(np.arange(len(seq)), num_splits)
    cut = (first_split[block] + _ranges(num_splits)) * split
    is_split = num_splits > 1
    items = np.zeros((len(block), ITEM_FIELDS), dtype=np.int32)
    items[:, 0] = seqs[seq][block]
    items[:, 1] = (first_rows[seq] + within)[block]
    items[:, 2] = num_rows[block]
    items[:, 3] = position[block]
    items[:, 4] = np.maximum(kv_start[block], cut)
    items[:, 5] = np.minimum(kv_end[block], cut + split)
    items[:, 6] = np.where(is_split[block], np.cumsum(is_split[block]) - 1, -1)
    merges = np.zeros((int(is_split.sum()), MERGE_FIELDS), dtype=np.int32)
    merges[:, 1] = num_splits[is_split]
    merges[:, 0] = np.cumsum(merges[:, 1]) - merges[:, 1]
    merges[:, 2] = (first_rows[seq] + within)[is_split]
    merges[:, 3] = num_rows[is_split]
    return items, merges


def _ranges(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _plan_class(batch: AttentionBatch, seqs: NDArray[np.int64], config: Config, heads: HeadShape) -> ClassPlan:
    block_m = lanes_of(config, heads.group)
    items, merges = cut_sequences(batch, seqs, block_m // heads.group, config["split_tokens"], heads.window)
    # Longest ranges first: what runs last should be short.
    items = items[np.argsort(items[:, 4] - items[:, 5], kind="stable")]
    device = batch.block_tables.device
    return ClassPlan(
        config=config,
        block_m=block_m,
        items=upload(items, device),
        merges=upload(merges, device),
        num_partials=int(merges[:, 1].sum()),
        window=heads.window,
        num_lanes=int(merges[:, 3].max(initial=0)) * heads.group,
    )


def plans_of(batch: AttentionBatch, heads: HeadShape) -> tuple[ClassPlan, ...]:
    """The batch's classes, cut at their first use and kept with it: all layers of equal window share them."""
    plans: dict[HeadShape, tuple[ClassPlan, ...]] = batch.__dict__.setdefault("_triton_plans", {})
    known = plans.get(heads)
    if known is None:
        assert batch.block_tables.dtype is torch.int32
        assert batch.block_tables.is_contiguous()
        query_lens = np.array(batch.host_query_lens, dtype=np.int64)
        device = batch.block_tables.device
        classes: dict[int, tuple[Config, list[int]]] = {}
        for query_len in np.unique(query_lens).tolist():
            config = heads.config(query_len, device)
            classes.setdefault(id(config), (config, []))[1].append(query_len)
        known = plans[heads] = tuple(
            _plan_class(batch, np.flatnonzero(np.isin(query_lens, lens)), config, heads)
            for config, lens in classes.values()
        )
    return known


def reserve_plan(batch: AttentionBatch, heads: HeadShape, max_kv_tokens: int) -> ClassPlan:
    """Give a batch of decodes a plan with room for any contexts, and fill in its own. For capture into a CUDA graph.

    Args:
        batch: one row per sequence; its tensors are the ones that will be captured.
        heads: see ``plans_of``.
        max_kv_tokens: most tokens that all contexts may have together.
    """
    num_seqs = len(batch.host_query_lens)
    assert set(batch.host_query_lens) == {1}, "only decodes have launches of a fixed size"
    device = batch.block_tables.device
    config = heads.config(1, device)
    # A window may straddle one cut more than its length has; so may a context's last token.
    num_items = num_seqs * 2 + max_kv_tokens // (config["split_tokens"] or _UNSPLIT)
    plan = ClassPlan(
        config=config,
        block_m=lanes_of(config, heads.group),
        items=torch.zeros((num_items, ITEM_FIELDS), dtype=torch.int32, device=device),
        merges=torch.zeros((num_seqs, MERGE_FIELDS), dtype=torch.int32, device=device),
        num_partials=num_items,
        window=heads.window,
        num_lanes=heads.group,
    )
    batch.__dict__.setdefault("_triton_plans", {})[heads] = (plan,)
    refresh_plan(plan, batch, heads)
    return plan


def refresh_plan(plan: ClassPlan, batch: AttentionBatch, heads: HeadShape) -> None:
    """Fill a reserved plan with another step's contexts, in place and in stream order.

    Args:
        plan: of ``reserve_plan``.
        batch: the step, of no more sequences; only its host numbers are read.
        heads: as reserved.
    """
    seqs = np.arange(len(batch.host_query_lens))
    parts = cut_sequences(batch, seqs, plan.block_m // heads.group, plan.config["split_tokens"], heads.window)
    for part, reserved in zip(parts, (plan.items, plan.merges), strict=True):
        assert len(part) <= len(reserved), f"{len(part)} entries, room for {len(reserved)}"
        padded = np.zeros(reserved.shape, dtype=np.int32)
        padded[: len(part)] = part
        reserved.copy_(upload(padded, reserved.device))

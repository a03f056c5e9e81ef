"""The tensors that captured decode steps read: made once, as large as the largest step, refilled before each replay.

Rows past a step's own are padding: sequences of one token in a scrap block each, without an adapter, so that every
backend can carry them out, and nothing they write is ever read by anyone else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pomona.kernels import attention as attention_ops
from pomona.kernels import lora as lora_ops
from pomona.kernels.attention import AttentionBatch
from pomona.kernels.copies import upload
from pomona.kernels.lora import LoraBatch, LoraRanks
from pomona.model.lora import LoraState
from pomona.model.spec import ModelSpec, Site, Target
from pomona.runner.adapter_pool import AdapterPool
from pomona.runner.batch import AdapterRun, HostBatch, fill_pending


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What the captured steps have room for."""

    batch_sizes: tuple[int, ...]
    """Rows of the captured steps, ascending; a step takes the smallest that holds it."""
    max_lora_rank: int
    """Adapters of larger rank make a step run without a graph."""
    num_kv_blocks: int
    """The scheduler's, with those of adapter pages that it may use; scrap blocks come after them."""
    block_size: int
    max_model_len: int

    @property
    def num_scrap_blocks(self) -> int:
        """Most rows of padding that a step can have."""
        return max(size - before - 1 for before, size in zip((0, *self.batch_sizes), self.batch_sizes, strict=False))

    def max_kv_tokens(self, num_rows: int) -> int:
        """Tokens that the contexts of so many rows may have together; sharing prefixes, they could have more than the
        blocks, and then run without a graph."""
        return min(num_rows * self.max_model_len, self.num_kv_blocks * self.block_size) + num_rows


class DecodeInputs:
    """What every decode step reads, whoever its rows belong to.

    Args:
        limits: sizes.
        device: where the tensors live.
    """

    def __init__(self, limits: GraphLimits, device: torch.device) -> None:
        self._limits = limits
        self._device = device
        num_rows = limits.batch_sizes[-1]
        max_blocks = -(-limits.max_model_len // limits.block_size)
        # Token ids, positions and KV slots. Before the first step rows write anywhere: no block has an owner yet.
        self._columns = torch.zeros((3, num_rows), dtype=torch.int64, device=device)
        self._columns[2] = torch.arange(num_rows, device=device) % (limits.num_kv_blocks * limits.block_size)
        self._query_starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self._context_lens = torch.ones(num_rows, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros((num_rows, max_blocks), dtype=torch.int32, device=device)
        self._scrap_blocks = limits.num_kv_blocks + np.arange(limits.num_scrap_blocks, dtype=np.int64)

    def token_ids(self, num_rows: int) -> torch.Tensor:
        """int64 [num_rows]."""
        return self._columns[0, :num_rows]

    def positions(self, num_rows: int) -> torch.Tensor:
        """int64 [num_rows]."""
        return self._columns[1, :num_rows]

    def attention(self, num_rows: int) -> AttentionBatch:
        """The rows as sequences, for now of one token each."""
        return AttentionBatch(
            query_starts=self._query_starts[: num_rows + 1],
            context_lens=self._context_lens[:num_rows],
            block_tables=self._block_tables[:num_rows],
            slot_mapping=self._columns[2, :num_rows],
            host_query_lens=(1,) * num_rows,
            host_context_lens=(1,) * num_rows,
        )

    def fill(self, batch: HostBatch, latest: torch.Tensor | None, attention: AttentionBatch) -> AttentionBatch:
        """Write a step's rows, then padding.

        Args:
            batch: decodes, at most as many as ``attention`` has rows.
            latest: see ``batch.to_device``.
            attention: of ``self.attention``, or what this returned last.

        Returns:
            ``attention`` with the step's contexts.
        """
        num_seqs, num_rows = len(batch.token_ids), len(attention.host_query_lens)
        scrap = self._scrap_blocks[: num_rows - num_seqs]
        columns = np.zeros((3, num_rows), dtype=np.int64)
        columns[:, :num_seqs] = batch.token_ids, batch.positions, batch.slots
        columns[2, num_seqs:] = scrap * self._limits.block_size
        context_lens = np.ones(num_rows, dtype=np.int32)
        context_lens[:num_seqs] = batch.context_lens
        tables = np.zeros((num_rows, batch.block_tables.shape[1]), dtype=np.int32)
        tables[:num_seqs] = batch.block_tables
        tables[num_seqs:, 0] = scrap
        self._columns[:, :num_rows].copy_(upload(columns, self._device))
        self._context_lens[:num_rows].copy_(upload(context_lens, self._device))
        self._block_tables[:num_rows, : tables.shape[1]].copy_(upload(tables, self._device))
        fill_pending(self.token_ids(num_rows), batch, latest)
        return attention_ops.renew(attention, context_lens.tolist())


class LoraInputs:
    """The adapters of a decode step, in tensors with room for one segment per row.

    Args:
        limits: sizes.
        pool: whose residents the steps use.
        spec: the base model's.
        device: where the tensors live.
        is_frozen: see ``Capture.is_frozen``: host ranks are then read at capture alone, and say that every site may be
            adapted.
    """

    def __init__(
        self, limits: GraphLimits, pool: AdapterPool, spec: ModelSpec, device: torch.device, *, is_frozen: bool
    ) -> None:
        self._pool = pool
        self._device = device
        self._max_rank = limits.max_lora_rank
        self._num_segments = num_segments = limits.batch_sizes[-1]
        self._num_layers = spec.num_layers
        self._is_frozen = is_frozen
        shape = (spec.num_layers, len(Target), num_segments)
        self._bounds = torch.zeros((2, num_segments), dtype=torch.int32, device=device)
        max_pages = -(-limits.max_lora_rank // pool.rows_per_page)
        self._page_tables = torch.zeros((num_segments, max_pages), dtype=torch.int32, device=device)
        self._device_ranks = torch.zeros(shape, dtype=torch.int32, device=device)
        self._device_scalings = torch.zeros(shape, dtype=torch.float32, device=device)
        self._ranks_key: object = None
        at_capture = np.full(shape, int(is_frozen), dtype=np.int32)
        self._ranks = self._site_ranks(at_capture, at_capture.astype(np.float32))

    def state(self) -> LoraState:
        """For now without segments."""
        empty = self._padded_rows(())
        return LoraState(
            batch=LoraBatch(
                starts=self._bounds[0],
                ends=self._bounds[1],
                page_tables=self._page_tables,
                host_rows=empty,
                host_pages=((),) * self._num_segments,
                max_rank=self._max_rank,
            ),
            slices=self._pool.slices,
            ranks=self._ranks,
        )

    def has_room(self, runs: Sequence[AdapterRun]) -> bool:
        """True if the adapters are on the device and have nothing but low-rank parts, of ranks that fit."""
        return all(
            resident.copy is None and resident.extras is None and resident.max_rank <= self._max_rank
            for resident in (self._pool.resident(run.adapter_id) for run in runs)
        )

    def fill(self, runs: Sequence[AdapterRun], state: LoraState) -> LoraState:
        """Write a step's segments.

        Args:
            runs: for which there is room.
            state: of ``self.state``, or what this returned last.

        Returns:
            ``state`` with the step's segments.
        """
        residents = [self._pool.resident(run.adapter_id) for run in runs]
        host_pages = [resident.page_ids for resident in residents]
        tables = np.zeros(tuple(self._page_tables.shape), dtype=np.int32)
        for index, page_ids in enumerate(host_pages):
            tables[index, : len(page_ids)] = page_ids
        rows = self._padded_rows(runs)
        self._page_tables.copy_(upload(tables, self._device))
        self._bounds.copy_(upload(np.ascontiguousarray(np.array(rows, dtype=np.int32).T), self._device))
        key = (self._pool.generation, tuple(run.adapter_id for run in runs))
        if key != self._ranks_key:
            self._fill_ranks(
                np.stack([resident.ranks for resident in residents], axis=-1),
                np.stack([resident.scalings for resident in residents], axis=-1),
            )
            self._ranks_key = key
        padding: list[tuple[int, ...]] = [()] * (self._num_segments - len(runs))
        return LoraState(
            lora_ops.renew(state.batch, rows, (*host_pages, *padding)), slices=state.slices, ranks=self._ranks
        )

    def _fill_ranks(self, ranks: NDArray[np.int32], scalings: NDArray[np.float32]) -> None:
        """Take over ranks and scalings [num_layers, num_targets, number of segments]."""
        shape = tuple(self._device_ranks.shape)
        padded_ranks, padded_scalings = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        padded_ranks[..., : ranks.shape[-1]] = ranks
        padded_scalings[..., : ranks.shape[-1]] = scalings
        self._device_ranks.copy_(upload(padded_ranks, self._device))
        self._device_scalings.copy_(upload(padded_scalings, self._device))
        if not self._is_frozen:
            self._ranks = self._site_ranks(padded_ranks, padded_scalings)

    def _site_ranks(self, ranks: NDArray[np.int32], scalings: NDArray[np.float32]) -> dict[tuple[int, Site], LoraRanks]:
        """Every site's part of the tensors, beside these host numbers."""
        parts = {site: slice(site.value[0], site.value[-1] + 1) for site in Site}
        return {
            (layer, site): LoraRanks(
                ranks=self._device_ranks[layer, part],
                scalings=self._device_scalings[layer, part],
                host_ranks=tuple(map(tuple, ranks[layer, part].tolist())),
                host_scalings=tuple(map(tuple, scalings[layer, part].tolist())),
            )
            for layer in range(self._num_layers)
            for site, part in parts.items()
        }

    def _padded_rows(self, runs: Sequence[AdapterRun]) -> tuple[tuple[int, int], ...]:
        """(start, end) per segment, then empty ones."""
        rows = [(run.start, run.end) for run in runs]
        end = rows[-1][1] if rows else 0
        return (*rows, *[(end, end)] * (self._num_segments - len(rows)))

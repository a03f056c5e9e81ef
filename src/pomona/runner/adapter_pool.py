"""AdapterPool: device pages of adapter weights, and the LoRA inputs of a step made from them.

It obeys the plan: which adapter is in which pages was decided by ``sched.AdapterSlots``. Nothing here chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pomona.core.ids import AdapterId
from pomona.core.plan import AdapterLoad
from pomona.kernels.lora import LoraBatch, LoraRanks
from pomona.model.adapter_weights import AdapterWeights
from pomona.model.lora import AdapterExtras, LoraState, PageLayout
from pomona.model.spec import Site
from pomona.runner.batch import AdapterRun
from pomona.runner.copies import upload
from pomona.runner.kv_cache import lazy_zeros


@dataclass(frozen=True)
class Resident:
    """One adapter on the device."""

    page_ids: tuple[int, ...]
    """Pages that hold rank rows, in order (surplus pages only pay for the extras' memory)."""
    ranks: NDArray[np.int32]
    """[num_layers, num_targets]."""
    scalings: NDArray[np.float32]
    """[num_layers, num_targets]."""
    max_rank: int
    extras: AdapterExtras | None


class AdapterPool:
    """Resident adapters and the page pool they live in."""

    def __init__(self, layout: PageLayout, num_pages: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._pages = lazy_zeros((num_pages, layout.page_elems), dtype=dtype, device=device)
        self._resident: dict[AdapterId, Resident] = {}
        self.num_pages = num_pages
        self.rows_per_page = layout.rows_per_page
        self.slices = {
            (layer, site): layout.slices(self._pages, layer, site)
            for layer in range(layout.spec.num_layers)
            for site in Site
        }
        """Views into the pages: A and B of every site."""
        self.generation = 0
        """Counts steps that evicted or loaded adapters: while it stays, what is known of residents holds."""
        # Ranks depend only on which adapters meet in which order; decode steps repeat the same meeting for long.
        self._ranks_key: tuple[AdapterId, ...] = ()
        self._ranks: dict[tuple[int, Site], LoraRanks] = {}
        self.num_bytes_copied = 0
        """Bytes copied into pages since start: adapters are copied when loaded, never in a step that uses them."""

    @property
    def resident_ids(self) -> frozenset[AdapterId]:
        """Adapters that a step may use now."""
        return frozenset(self._resident)

    def apply(
        self, evictions: Sequence[AdapterId], loads: Sequence[AdapterLoad], staged: dict[AdapterId, AdapterWeights]
    ) -> None:
        """Carry out a plan's evictions, then its loads.

        Args:
            evictions: adapters to forget; their pages may be overwritten at once.
            loads: adapters and the pages they get.
            staged: host copies; must hold every adapter to load.
        """
        for adapter_id in evictions:
            del self._resident[adapter_id]
        for load in loads:
            self._load(load, staged[load.adapter_id])
        if evictions or loads:
            self._ranks_key = ()
            self.generation += 1

    def resident(self, adapter_id: AdapterId) -> Resident:
        """An adapter on the device."""
        return self._resident[adapter_id]

    def _load(self, load: AdapterLoad, weights: AdapterWeights) -> None:
        num_rank_pages = weights.pages.shape[0]
        assert len(load.page_ids) >= num_rank_pages, "the scheduler granted fewer pages than the adapter needs"
        page_ids = load.page_ids[:num_rank_pages]
        for index, page_id in enumerate(page_ids):
            self._pages[page_id].copy_(weights.pages[index], non_blocking=True)
        self.num_bytes_copied += weights.pages.numel() * weights.pages.element_size()
        self._resident[load.adapter_id] = Resident(
            page_ids=page_ids,
            ranks=np.asarray(weights.ranks, dtype=np.int32),
            scalings=np.asarray(weights.scalings, dtype=np.float32),
            max_rank=int(np.max(weights.ranks, initial=0)),
            extras=weights.extras.to(self._device) if weights.extras is not None else None,
        )

    def state(self, runs: Sequence[AdapterRun]) -> LoraState | None:
        """The step's LoRA inputs, or None if no row uses an adapter.

        Args:
            runs: runs of rows of one adapter each, in row order.
        """
        if not runs:
            return None
        residents = [self._resident[run.adapter_id] for run in runs]
        max_pages = max(len(resident.page_ids) for resident in residents)
        page_tables = np.zeros((len(runs), max(max_pages, 1)), dtype=np.int32)
        for index, resident in enumerate(residents):
            page_tables[index, : len(resident.page_ids)] = resident.page_ids
        rows = tuple((run.start, run.end) for run in runs)
        bounds = upload(np.array(rows, dtype=np.int32), self._device)
        batch = LoraBatch(
            starts=bounds[:, 0].contiguous(),
            ends=bounds[:, 1].contiguous(),
            page_tables=upload(page_tables, self._device),
            host_rows=rows,
            host_pages=tuple(resident.page_ids for resident in residents),
            max_rank=max(resident.max_rank for resident in residents),
        )
        extras = [(run, resident.extras) for run, resident in zip(runs, residents, strict=True)]
        return LoraState(
            batch=batch,
            slices=self.slices,
            ranks=self._ranks_of(tuple(run.adapter_id for run in runs), residents),
            extras=tuple((run.start, run.end, extra) for run, extra in extras if extra is not None),
            logit_extras=tuple(
                (run.sampled_start, run.sampled_end, extra)
                for run, extra in extras
                if extra is not None and run.sampled_end > run.sampled_start
            ),
        )

    def _ranks_of(self, key: tuple[AdapterId, ...], residents: Sequence[Resident]) -> dict[tuple[int, Site], LoraRanks]:
        if key != self._ranks_key:
            ranks = np.stack([resident.ranks for resident in residents], axis=-1)  # [layers, targets, segments]
            scalings = np.stack([resident.scalings for resident in residents], axis=-1)
            device_ranks = upload(ranks, self._device)
            device_scalings = upload(scalings, self._device)
            self._ranks = {
                (layer, site): LoraRanks(
                    ranks=device_ranks[layer, site.value[0] : site.value[-1] + 1],
                    scalings=device_scalings[layer, site.value[0] : site.value[-1] + 1],
                    host_ranks=_as_tuples(ranks[layer, site.value[0] : site.value[-1] + 1]),
                    host_scalings=_as_tuples(scalings[layer, site.value[0] : site.value[-1] + 1]),
                )
                for layer in range(self._layout.spec.num_layers)
                for site in Site
            }
            self._ranks_key = key
        return self._ranks


def _as_tuples(array: NDArray[np.generic]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in array.tolist())

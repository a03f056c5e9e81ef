"""AdapterPool: device pages of adapter weights, and the LoRA inputs of a step made from them.

It obeys the plan: which adapter is in which pages was decided by ``sched.AdapterSlots``, and who waits for a copy too.
Nothing here chooses, except that rows of an adapter use the host copy in those layers that have not arrived.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.core.ids import AdapterId
from pomona.core.plan import AdapterLoad
from pomona.kernels.copies import upload
from pomona.kernels.lora import LoraBatch, LoraRanks, can_shift_pages, shift_pages
from pomona.model.adapter_weights import AdapterWeights
from pomona.model.lora import AdapterExtras, HostCopy, HostLora, LateLayers, LoraState, PageLayout
from pomona.model.spec import Site
from pomona.runner.adapter_copies import AdapterCopies, AdapterCopy
from pomona.runner.batch import AdapterRun

_LOGGER = logging.getLogger(__name__)

_NUM_MEETINGS = 4
"""Meetings of adapters whose ranks are kept: that of the decodes, and those of steps with a prompt between them."""
_NO_ROWS: NDArray[np.int32] = np.empty((0, 2), dtype=np.int32)


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
    """On the device; None until the copy has been made."""
    copy: AdapterCopy | None = None
    """What is still on its way."""


class AdapterPool:
    """Resident adapters and the page pool they live in.

    Args:
        layout: of a page.
        pages: [num_pages, page_elems], as many as the scheduler was told, with any row stride. Those that hold no
            adapter are others' to write to.
        link_bytes_per_s: copies go no faster; None for as fast as it goes.
    """

    def __init__(self, layout: PageLayout, pages: Tensor, *, link_bytes_per_s: float | None = None) -> None:
        self._layout = layout
        self._device = pages.device
        self._pages = pages
        self._copies = AdapterCopies(self._pages, layout.spec.num_layers, link_bytes_per_s)
        self._resident: dict[AdapterId, Resident] = {}
        self.under_way: dict[int, tuple[AdapterId, AdapterCopy]] = {}
        """Copies beside the steps that had not been made when a plan was last applied, by load."""
        self.failed_loads: set[int] = set()
        """Loads whose copies failed and that no step has told of."""
        self.deferred: list[AdapterCopy] = []
        """Copies that begin when the step has been computed."""
        self._reads_host_copies = can_shift_pages(self._pages)
        self._host_copies: dict[AdapterId, HostCopy] = {}
        self.num_pages = pages.shape[0]
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
        self._ranks: dict[tuple[AdapterId, ...], dict[tuple[int, Site], LoraRanks]] = {}
        self.num_bytes_copied = 0
        """Bytes copied into pages since start: adapters are copied when loaded, never in a step that uses them."""

    @property
    def resident_ids(self) -> frozenset[AdapterId]:
        """Adapters that a step may use now."""
        return frozenset(self._resident)

    @property
    def link_bytes_per_s(self) -> float | None:
        """Copies go no faster; None for as fast as it goes. May be changed between steps."""
        return self._copies.bytes_per_s

    @link_bytes_per_s.setter
    def link_bytes_per_s(self, value: float | None) -> None:
        self._copies.bytes_per_s = value

    @property
    def loading(self) -> frozenset[int]:
        """Loads whose copies have not been made."""
        return frozenset(load_id for load_id, (_, copy) in self.under_way.items() if not copy.is_done)

    def take_failed(self) -> frozenset[int]:
        """Loads whose copies failed, each told once."""
        failed = frozenset(self.failed_loads)
        self.failed_loads.clear()
        return failed

    def wait(self, timeout_s: float) -> None:
        """Wait until a copy has been made, at most so long; not at all if none is under way."""
        if self.under_way:
            self._copies.wait(timeout_s)

    def apply(
        self,
        evictions: Sequence[AdapterId],
        loads: Sequence[AdapterLoad],
        staged: dict[AdapterId, AdapterWeights],
        used: Collection[AdapterId] = (),
    ) -> None:
        """Carry out a plan's evictions, then its loads; take note of copies that have been made.

        Args:
            evictions: adapters to forget; their pages may be overwritten as soon as this returns. Those that are not
                there are ignored.
            loads: adapters and the pages they get.
            staged: host copies; must hold every adapter to load.
            used: adapters of the step's rows. On a CPU their copies wait for ``begin_deferred``: they would take from
                the step, which reads the host copies anyway, the very cores that it computes on.
        """
        if self.deferred:
            self.begin_deferred()
        if self.under_way:
            self._settle()
        for adapter_id in evictions:
            if adapter_id in self._resident:
                self._forget(adapter_id)
        for load in loads:
            self._load(load, staged[load.adapter_id], used)
        if evictions or loads:
            self.generation += 1

    def resident(self, adapter_id: AdapterId) -> Resident:
        """An adapter on the device, or on the way there."""
        return self._resident[adapter_id]

    def _settle(self) -> None:
        for load_id, (adapter_id, copy) in list(self.under_way.items()):
            if not copy.is_done:
                continue
            del self.under_way[load_id]
            self._note_failure(load_id, adapter_id, copy)
            self._resident[adapter_id] = replace(self._resident[adapter_id], copy=None, extras=copy.extras)
            self._host_copies.pop(adapter_id, None)

    def _note_failure(self, load_id: int, adapter_id: AdapterId, copy: AdapterCopy) -> None:
        if copy.error is not None:
            _LOGGER.error("Adapter %s could not be copied to the device", adapter_id, exc_info=copy.error)
            self.failed_loads.add(load_id)

    def _forget(self, adapter_id: AdapterId) -> None:
        del self._resident[adapter_id]
        for key in [key for key in self._ranks if adapter_id in key]:
            del self._ranks[key]
        self._host_copies.pop(adapter_id, None)
        for load_id, (other_id, copy) in list(self.under_way.items()):
            if other_id == adapter_id:
                self._copies.cancel(copy)
                del self.under_way[load_id]

    def begin_deferred(self) -> None:
        """Begin the copies that were to wait until the step has been computed."""
        while self.deferred:
            self._copies.begin(self.deferred.pop(0))

    def _load(self, load: AdapterLoad, weights: AdapterWeights, used: Collection[AdapterId]) -> None:
        num_rank_pages = weights.pages.shape[0]
        assert len(load.page_ids) >= num_rank_pages, "the scheduler granted fewer pages than the adapter needs"
        # After a failure the scheduler has forgotten who was where.
        pages = set(load.page_ids)
        for other_id, other in [*self._resident.items()]:
            if other_id == load.adapter_id or not pages.isdisjoint(other.page_ids):
                self._forget(other_id)
        page_ids = load.page_ids[:num_rank_pages]
        copy = self._copies.prepare(weights, page_ids)
        if load.is_awaited:
            self._copies.make(copy)
            self._note_failure(load.load_id, load.adapter_id, copy)
        else:
            if self._reads_host_copies and weights.extras is None and load.adapter_id in used:
                self.deferred.append(copy)
            else:
                self._copies.begin(copy)
            self.under_way[load.load_id] = (load.adapter_id, copy)
        self.num_bytes_copied += weights.pages.numel() * weights.pages.element_size()
        self._resident[load.adapter_id] = Resident(
            page_ids=page_ids,
            ranks=np.asarray(weights.ranks, dtype=np.int32),
            scalings=np.asarray(weights.scalings, dtype=np.float32),
            max_rank=int(np.max(weights.ranks, initial=0)),
            extras=copy.extras if load.is_awaited else None,
            copy=None if load.is_awaited else copy,
        )

    def state(self, runs: Sequence[AdapterRun]) -> LoraState | None:
        """The step's LoRA inputs, or None if no row uses an adapter.

        Args:
            runs: runs of rows of one adapter each, in row order.
        """
        if not runs:
            return None
        for run in runs if self.under_way else ():
            self._await_extras(run.adapter_id)
        batch, ranks = self._on_device(runs)
        extras = [(run, self._resident[run.adapter_id].extras) for run in runs]
        return LoraState(
            batch=batch,
            slices=self.slices,
            ranks=ranks,
            extras=tuple((run.start, run.end, extra) for run, extra in extras if extra is not None),
            logit_extras=tuple(
                (run.sampled_start, run.sampled_end, extra)
                for run, extra in extras
                if extra is not None and run.sampled_end > run.sampled_start
            ),
            late=self._late_layers(runs, batch, ranks) if self.under_way else (),
        )

    def _await_extras(self, adapter_id: AdapterId) -> None:
        """Wait for a copy of what cannot be read elsewhere."""
        copy = self._resident[adapter_id].copy
        if copy is not None and copy.weights.extras is not None:
            self._copies.finish(copy)
            self._settle()

    def _on_device(self, runs: Sequence[AdapterRun]) -> tuple[LoraBatch, dict[tuple[int, Site], LoraRanks]]:
        """Runs as segments of the pool."""
        residents = [self._resident[run.adapter_id] for run in runs]
        max_pages = max((len(resident.page_ids) for resident in residents), default=0)
        page_tables = np.zeros((len(runs), max(max_pages, 1)), dtype=np.int32)
        for index, resident in enumerate(residents):
            page_tables[index, : len(resident.page_ids)] = resident.page_ids
        rows = tuple((run.start, run.end) for run in runs)
        bounds = upload(np.array(rows if rows else _NO_ROWS, dtype=np.int32), self._device)
        batch = LoraBatch(
            starts=bounds[:, 0].contiguous(),
            ends=bounds[:, 1].contiguous(),
            page_tables=upload(page_tables, self._device),
            host_rows=rows,
            host_pages=tuple(resident.page_ids for resident in residents),
            max_rank=max((resident.max_rank for resident in residents), default=0),
        )
        meeting = tuple(run.adapter_id for run in runs)
        return batch, self._ranks[meeting] if meeting in self._ranks else self._ranks_of(meeting, residents)

    def _late_layers(
        self, runs: Sequence[AdapterRun], batch: LoraBatch, ranks: dict[tuple[int, Site], LoraRanks]
    ) -> tuple[LateLayers, ...]:
        """How the step computes the layers that have not arrived for all of its adapters by now.

        Args:
            runs: the step's.
            batch: all of them as segments of the pool.
            ranks: of these.
        """
        num_layers = self._layout.spec.num_layers
        copies = [self._resident[run.adapter_id].copy for run in runs]
        arrived = [num_layers if copy is None else copy.num_layers for copy in copies]
        found = []
        for first in sorted(set(arrived) - {num_layers}):
            late = [copy if count <= first else None for copy, count in zip(copies, arrived, strict=True)]
            if self._reads_host_copies:
                instead = [None if copy is None else copy.weights.pages for copy in late]
                found.append(LateLayers(first, shift_pages(batch, self._pages, instead), ranks, ()))
            else:
                on_device = self._on_device([run for run, copy in zip(runs, late, strict=True) if copy is None])
                on_host = [self._host_lora(run, copy) for run, copy in zip(runs, late, strict=True) if copy is not None]
                found.append(LateLayers(first, *on_device, tuple(on_host)))
        return tuple(found)

    def _host_lora(self, run: AdapterRun, copy: AdapterCopy) -> HostLora:
        """A run of rows of an adapter that is on its way."""
        resident, pages = self._resident[run.adapter_id], copy.weights.pages
        host_copy = self._host_copies.get(run.adapter_id)
        if host_copy is None:
            host_copy = HostCopy(self._layout, pages, resident.ranks, resident.scalings)
            self._host_copies[run.adapter_id] = host_copy
        rows, page_ids = (0, run.end - run.start), tuple(range(pages.shape[0]))
        batch = LoraBatch(
            starts=torch.tensor(rows[:1], dtype=torch.int32),
            ends=torch.tensor(rows[1:], dtype=torch.int32),
            page_tables=torch.tensor([page_ids], dtype=torch.int32),
            host_rows=(rows,),
            host_pages=(page_ids,),
            max_rank=resident.max_rank,
        )
        return HostLora(run.start, run.end, batch, host_copy)

    def _ranks_of(
        self, meeting: tuple[AdapterId, ...], residents: Sequence[Resident]
    ) -> dict[tuple[int, Site], LoraRanks]:
        """Ranks of a meeting not met lately."""
        if not residents:
            return {}
        ranks = np.stack([resident.ranks for resident in residents], axis=-1)  # [layers, targets, segments]
        scalings = np.stack([resident.scalings for resident in residents], axis=-1)
        while len(self._ranks) >= _NUM_MEETINGS:
            del self._ranks[next(iter(self._ranks))]
        found = self._ranks[meeting] = self._site_ranks(ranks, scalings, self._device)
        return found

    def _site_ranks(
        self, ranks: NDArray[np.int32], scalings: NDArray[np.float32], device: torch.device
    ) -> dict[tuple[int, Site], LoraRanks]:
        """Every site's part of ranks and scalings [num_layers, num_targets, number of segments]."""
        device_ranks, device_scalings = upload(ranks, device), upload(scalings, device)
        parts = {site: slice(site.value[0], site.value[-1] + 1) for site in Site}
        return {
            (layer, site): LoraRanks(
                ranks=device_ranks[layer, part],
                scalings=device_scalings[layer, part],
                host_ranks=_as_tuples(ranks[layer, part]),
                host_scalings=_as_tuples(scalings[layer, part]),
            )
            for layer in range(self._layout.spec.num_layers)
            for site, part in parts.items()
        }


def _as_tuples(array: NDArray[np.generic]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in array.tolist())

"""Adapters inside the network: how their weights are laid out in pages, and how a step applies them.

The low-rank parts of the seven targets go through ``kernels.lora`` for all segments at once. Everything else a PEFT
adapter may carry (DoRA magnitudes, biases, saved modules, embedding and lm_head LoRA, replaced token rows) is rare and
dense: it is kept per adapter in ``AdapterExtras`` and applied segment by segment, only for segments that have it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pomona.kernels.linear import PackedWeight, packed_linear
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices, adapted_linear
from pomona.kernels.lora import lora as add_lora
from pomona.kernels.norm import rms_norm
from pomona.model.spec import ModelSpec, Site, Target


@dataclass(frozen=True)
class PageLayout:
    """Where things are in an adapter page.

    A page holds ``rows_per_page`` rank rows of *every* target of *every* layer, so one list of pages serves the whole
    adapter, and a layer is one piece of each of its pages. Within a page: layer by layer, target by target, A rows
    [rows_per_page, in_features] then B rows [rows_per_page, out_features].
    """

    spec: ModelSpec
    rows_per_page: int

    @cached_property
    def layer_elems(self) -> int:
        """Elements of one layer's part of a page."""
        return sum(self.rows_per_page * (in_features + out_features) for in_features, out_features, *_ in self._targets)

    @property
    def page_elems(self) -> int:
        """Elements of one page."""
        return self.layer_elems * self.spec.num_layers

    def offsets(self, layer: int, target: Target) -> tuple[int, int]:
        """Element offsets of A and of B within a page."""
        _, _, a_offset, b_offset = self._targets[target]
        return layer * self.layer_elems + a_offset, layer * self.layer_elems + b_offset

    def slices(self, pages: Tensor, layer: int, site: Site) -> LoraSlices:
        """Views of a page pool [num_pages, page_elems] as the A and B pages of one site."""
        num_pages, page_stride = pages.shape[0], pages.stride(0)
        base = pages.storage_offset() + layer * self.layer_elems
        a: list[Tensor] = []
        b: list[Tensor] = []
        for target in site.value:
            in_features, out_features, a_offset, b_offset = self._targets[target]
            for views, width, offset in ((a, in_features, a_offset), (b, out_features, b_offset)):
                shape, stride = (num_pages, self.rows_per_page, width), (page_stride, width, 1)
                views.append(pages.as_strided(shape, stride, base + offset))
        return LoraSlices(a=tuple(a), b=tuple(b))

    @cached_property
    def _targets(self) -> tuple[tuple[int, int, int, int], ...]:
        """Per target: in_features, out_features, offsets of A and of B within a layer's part."""
        parts, offset = [], 0
        for target in Target:
            in_features, out_features = self.spec.target_shape(target)
            b_offset = offset + self.rows_per_page * in_features
            parts.append((in_features, out_features, offset, b_offset))
            offset = b_offset + self.rows_per_page * out_features
        return tuple(parts)


@dataclass
class AdapterExtras:
    """The dense, rare parts of one adapter, on the device, in the model's dtype unless said otherwise."""

    dora_scales: dict[tuple[int, Target], Tensor] = field(default_factory=dict)
    """(layer, target) -> float32 [out_features]: m / ||W + s*BA|| per output, on base-without-bias plus LoRA."""
    biases: dict[tuple[int, Target], Tensor] = field(default_factory=dict)
    """(layer, target) -> float32 [out_features], added: lora_B's bias times scaling, and new minus base bias."""
    weights: dict[tuple[int, Target], Tensor] = field(default_factory=dict)
    """modules_to_save on a target: full weight [out_features, in_features] that replaces the base's."""
    norms: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """modules_to_save on a norm: (layer or -1 for the final norm, attribute name) -> weight."""
    embed_weight: Tensor | None = None
    """[vocab_size, hidden_size] instead of the base's: modules_to_save on embed_tokens, or embeddings saved along."""
    embed_lora: tuple[Tensor, Tensor, float] | None = None
    """lora_embedding_A transposed to [vocab_size, r], lora_embedding_B transposed to [r, hidden_size], scaling."""
    embed_dora_scale: Tensor | None = None
    """float32 [hidden_size]: m / ||W + s*BA|| per hidden dimension, on base plus LoRA."""
    embed_rows: tuple[Tensor, Tensor] | None = None
    """trainable_token_indices: sorted int64 token ids [n], their rows [n, hidden_size]."""
    lm_head_weight: Tensor | None = None
    """[vocab_size, hidden_size] instead of the base's; see embed_weight, which PEFT ties it to in some cases."""
    lm_head_lora: tuple[Tensor, Tensor, float] | None = None
    """A [r, hidden_size], B [vocab_size, r], scaling."""
    lm_head_rows: tuple[Tensor, Tensor] | None = None
    """Rows of lm_head replaced, its own or those of a tied embedding: sorted token ids [n], rows [n, hidden_size]."""
    lm_head_dora_scale: Tensor | None = None
    """float32 [vocab_size]."""
    lm_head_bias: Tensor | None = None
    """float32 [vocab_size], added."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor once, even if two parts share it."""
        seen: set[int] = set()
        for part in vars(self).values():
            members = part.values() if isinstance(part, dict) else part if isinstance(part, tuple) else (part,)
            for member in members:
                if isinstance(member, Tensor) and id(member) not in seen:
                    seen.add(id(member))
                    yield member

    @property
    def num_bytes(self) -> int:
        """Memory of all parts."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def to(self, device: torch.device) -> "AdapterExtras":
        """The same parts on another device; parts that share a tensor still do."""
        moved = {id(tensor): tensor.to(device, non_blocking=True) for tensor in self.tensors()}

        def move(part: Any) -> Any:
            if isinstance(part, Tensor):
                return moved[id(part)]
            if isinstance(part, dict):
                return {key: moved[id(tensor)] for key, tensor in part.items()}
            return tuple(move(member) for member in part) if isinstance(part, tuple) else part

        return AdapterExtras(**{name: move(part) for name, part in vars(self).items()})


class HostCopy:
    """An adapter's host copy as kernels read it; what a site needs is made when it is first asked for.

    Args:
        layout: of its pages.
        pages: [num_pages, page_elems] on the host.
        ranks: [num_layers, num_targets].
        scalings: like ``ranks``.
    """

    def __init__(
        self, layout: PageLayout, pages: Tensor, ranks: NDArray[np.int32], scalings: NDArray[np.float32]
    ) -> None:
        self.pages = pages
        self._layout = layout
        self._ranks = ranks
        self._scalings = scalings
        self._sites: dict[tuple[int, Site], tuple[LoraSlices, LoraRanks]] = {}

    def site(self, layer: int, site: Site) -> tuple[LoraSlices, LoraRanks]:
        """Its pages at a site, and its rank and scaling there as those of a single segment."""
        found = self._sites.get((layer, site))
        if found is None:
            part = slice(site.value[0], site.value[-1] + 1)
            ranks, scalings = self._ranks[layer, part, None], self._scalings[layer, part, None]
            of_segment = LoraRanks(
                ranks=torch.from_numpy(ranks),
                scalings=torch.from_numpy(scalings),
                host_ranks=tuple(map(tuple, ranks.tolist())),
                host_scalings=tuple(map(tuple, scalings.tolist())),
            )
            found = self._sites[layer, site] = self._layout.slices(self.pages, layer, site), of_segment
        return found


@dataclass(frozen=True)
class HostLora:
    """One adapter's part of a step where the device's kernels cannot read its host copy: computed on the host
    (CaraServe, arXiv 2401.11240, section 4)."""

    start: int
    """First row of the step's batch."""
    end: int
    batch: LoraBatch
    """One segment: rows [0, end - start). All tensors are on the host."""
    copy: HostCopy


@dataclass(frozen=True)
class LateLayers:
    """Layers for which not all adapters of the step are on the device: up to the next of these, or to the last."""

    first: int
    batch: LoraBatch
    """Segments that the device's kernels compute, from their pages or from host copies (``shift_pages``)."""
    ranks: dict[tuple[int, Site], LoraRanks]
    """Of these segments, for these layers at least."""
    on_host: tuple[HostLora, ...]
    """The others."""


@dataclass(frozen=True)
class LoraState:
    """All a forward pass must know of adapters in this step. Built once per step by the runner; None if no row has one.

    Row ranges in ``batch`` and ``extras`` are rows of the step's batch; in ``logit_extras`` they are rows of the
    hidden states handed to ``Decoder.logits``.
    """

    batch: LoraBatch
    slices: dict[tuple[int, Site], LoraSlices]
    """Views into the page pool: the same objects every step."""
    ranks: dict[tuple[int, Site], LoraRanks]
    extras: tuple[tuple[int, int, AdapterExtras], ...] = ()
    """(start row, end row, extras) of segments whose adapter has extras."""
    logit_extras: tuple[tuple[int, int, AdapterExtras], ...] = ()
    late: tuple[LateLayers, ...] = ()
    """Layers whose weights had not all arrived when the step was made, in order; ``batch`` and ``ranks`` are of those
    before. It stays so for the whole step, whatever arrives meanwhile. No adapter that is late has extras."""

    def at(self, layer: int) -> tuple[LoraBatch, dict[tuple[int, Site], LoraRanks], tuple[HostLora, ...]]:
        """A layer's segments, their ranks, and the adapters that are computed on the host."""
        for late in reversed(self.late):
            if layer >= late.first:
                return late.batch, late.ranks, late.on_host
        return self.batch, self.ranks, ()


def adapt_embeddings(out: Tensor, token_ids: Tensor, lora: LoraState) -> None:
    """Turn the base's embeddings into each row's own adapter's, in place.

    Args:
        out: [num_tokens, hidden_size].
        token_ids: int64 [num_tokens], of which ``out`` are the base's embeddings.
        lora: the step's adapters.
    """
    for start, end, extras in lora.extras:
        ids, rows = token_ids[start:end], out[start:end]
        if extras.embed_weight is not None:
            rows.copy_(functional.embedding(ids, extras.embed_weight))
        if extras.embed_lora is not None:
            a, b, scaling = extras.embed_lora
            wide = rows.float() + (functional.embedding(ids, a) @ b).float() * scaling
            rows.copy_(wide if extras.embed_dora_scale is None else wide * extras.embed_dora_scale)
        if extras.embed_rows is not None:
            replaced_ids, new_rows = extras.embed_rows
            index = torch.searchsorted(replaced_ids, ids).clamp_(max=replaced_ids.shape[0] - 1)
            is_replaced = (replaced_ids[index] == ids).unsqueeze(1)
            rows.copy_(torch.where(is_replaced, new_rows[index], rows))


def project(x: Tensor, weight: PackedWeight, bias: Tensor | None, layer: int, site: Site, lora: LoraState) -> Tensor:
    """A site's base product with the low-rank parts of the adapters that the device's kernels compute.

    Args:
        x: [num_tokens, in_features], what the site reads.
        weight: the base's.
        bias: the base's [sum of out_features], or None.
        layer: which layer.
        site: which product.
        lora: the step's adapters.

    Returns:
        [num_tokens, sum of out_features].
    """
    batch, ranks, _ = lora.at(layer)
    if not batch.host_rows:
        return packed_linear(x, weight, bias)
    return adapted_linear(x, weight, bias, lora.slices[layer, site], ranks[layer, site], batch)


def adapt(out: Tensor, x: Tensor, layer: int, site: Site, lora: LoraState, bias: Tensor | None) -> None:
    """Add what ``project`` left out, in place: adapters that are computed on the host, and what is not of low rank.

    Args:
        out: [num_tokens, sum of out_features], from ``project``.
        x: [num_tokens, in_features], what the site read.
        layer: which layer.
        site: which product.
        lora: the step's adapters.
        bias: the base's [sum of out_features], as it is in ``out``; None if there is none.
    """
    for part in lora.at(layer)[2] if lora.late else ():
        _add_from_host(out[part.start : part.end], x[part.start : part.end], (layer, site), part)
    if not lora.extras:
        return
    first = 0
    for target, b_pages in zip(site.value, lora.slices[layer, site].b, strict=True):
        columns = slice(first, first + b_pages.shape[2])
        first = columns.stop
        target_bias = None if bias is None else bias[columns]
        for start, end, extras in lora.extras:
            _adapt_target(out[start:end, columns], x[start:end], (layer, target), extras, target_bias)


def _add_from_host(out: Tensor, x: Tensor, key: tuple[int, Site], lora: HostLora) -> None:
    """Add one adapter's low-rank part to its rows ``out`` [rows, sum of out_features], from ``x`` [rows, in_features].
    On another device than a CPU, the part goes there in the model's dtype."""
    if out.device.type == "cpu":
        add_lora(out, x, *lora.copy.site(*key), lora.batch)
    elif any(any(of_slice) for of_slice in lora.copy.site(*key)[1].host_ranks):
        out += host_product(x.cpu(), out.shape[1], key, lora).to(out.device, non_blocking=True)


def host_product(x: Tensor, num_columns: int, key: tuple[int, Site], lora: HostLora) -> Tensor:
    """One adapter's low-rank part of a site's output alone.

    Args:
        x: [rows, in_features] on the host.
        num_columns: the site's out_features together.
        key: layer and site.
        lora: the adapter.

    Returns:
        [rows, num_columns] on the host, in the dtype of ``x``.
    """
    product = torch.zeros((x.shape[0], num_columns), dtype=x.dtype)
    add_lora(product, x, *lora.copy.site(*key), lora.batch)
    return product


def _adapt_target(out: Tensor, x: Tensor, key: tuple[int, Target], extras: AdapterExtras, bias: Tensor | None) -> None:
    """One target's dense parts for one segment: ``out`` [rows, out_features] already has base and low-rank part."""
    weight = extras.weights.get(key)
    if weight is not None:
        out.copy_(functional.linear(x, weight, bias))
    scale = extras.dora_scales.get(key)
    if scale is not None:
        # DoRA rescales W + s*BA, not the bias (arXiv 2402.09353, equation 5)
        wide = out.float()
        out.copy_(wide * scale if bias is None else (wide - bias) * scale + bias)
    added = extras.biases.get(key)
    if added is not None:
        out.copy_(out.float() + added)


def adapt_norm(x: Tensor, normed: Tensor, layer: int, name: str, lora: LoraState, eps: float) -> Tensor:
    """Normalize again, with their own weight, the rows whose adapter brings one.

    Args:
        x: what was normalized, [num_tokens, ..., features].
        normed: with the base's weight; changed in place.
        layer: which layer; -1 with name "norm" is the final norm.
        name: attribute name of the norm.
        lora: the step's adapters.
        eps: the norm's.

    Returns:
        ``normed``.
    """
    for start, end, extras in lora.extras:
        weight = extras.norms.get((layer, name))
        if weight is not None:
            normed[start:end] = rms_norm(x[start:end], weight, eps)
    return normed


def adapt_logits(logits: Tensor, hidden_rows: Tensor, lora: LoraState) -> Tensor:
    """Turn the base's logits into each row's own adapter's.

    Args:
        logits: float32 [num_rows, vocab_size]; changed in place.
        hidden_rows: [num_rows, hidden_size].
        lora: the step's adapters; its ``logit_extras`` name rows of ``hidden_rows``.

    Returns:
        ``logits``.
    """
    for start, end, extras in lora.logit_extras:
        hidden, rows = hidden_rows[start:end], logits[start:end]
        if extras.lm_head_weight is not None:
            rows.copy_(functional.linear(hidden, extras.lm_head_weight))
        if extras.lm_head_rows is not None:
            token_ids, new_rows = extras.lm_head_rows
            rows[:, token_ids] = functional.linear(hidden, new_rows).to(rows.dtype)
        if extras.lm_head_lora is not None:
            a, b, scaling = extras.lm_head_lora
            rows += functional.linear(functional.linear(hidden, a), b).float() * scaling
        if extras.lm_head_dora_scale is not None:
            rows *= extras.lm_head_dora_scale
        if extras.lm_head_bias is not None:
            rows += extras.lm_head_bias
    return logits

"""Adapters inside the network: how their weights are laid out in pages, and how a step applies them.

The low-rank parts of the seven targets go through ``kernels.lora`` for all segments at once. Everything else a PEFT
adapter may carry (DoRA magnitudes, biases, saved modules, embedding and lm_head LoRA, replaced token rows) is rare and
dense: it is kept per adapter in ``AdapterExtras`` and applied segment by segment, only for segments that have it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices
from pomona.model.spec import ModelSpec, Site, Target


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where things are in an adapter page.

    A page holds ``rows_per_page`` rank rows of *every* target of *every* layer, so one list of pages serves the whole
    adapter and copying an adapter is one contiguous copy per page. Within a page: layer by layer, target by target,
    A rows [rows_per_page, in_features] then B rows [rows_per_page, out_features].
    """

    spec: ModelSpec
    rows_per_page: int

    @property
    def layer_elems(self) -> int:
        """Elements of one layer's part of a page."""
        return sum(self.rows_per_page * sum(self.spec.target_shape(target)) for target in Target)

    @property
    def page_elems(self) -> int:
        """Elements of one page."""
        return self.layer_elems * self.spec.num_layers

    def offsets(self, layer: int, target: Target) -> tuple[int, int]:
        """Element offsets of A and of B within a page."""
        offset = layer * self.layer_elems
        for earlier in Target:
            in_features, out_features = self.spec.target_shape(earlier)
            if earlier is target:
                return offset, offset + self.rows_per_page * in_features
            offset += self.rows_per_page * (in_features + out_features)
        raise AssertionError(target)

    def slices(self, pages: Tensor, layer: int, site: Site) -> LoraSlices:
        """Views of a page pool [num_pages, page_elems] as the A and B pages of one site."""
        a, b = [], []
        for target in site.value:
            in_features, out_features = self.spec.target_shape(target)
            a_offset, b_offset = self.offsets(layer, target)
            strides = (pages.stride(0),)
            base = pages.storage_offset()
            a.append(
                pages.as_strided(
                    (pages.shape[0], self.rows_per_page, in_features), (*strides, in_features, 1), base + a_offset
                )
            )
            b.append(
                pages.as_strided(
                    (pages.shape[0], self.rows_per_page, out_features), (*strides, out_features, 1), base + b_offset
                )
            )
        return LoraSlices(a=tuple(a), b=tuple(b))


@dataclass
class AdapterExtras:
    """The dense, rare parts of one adapter, on the device, in the model's dtype unless said otherwise."""

    dora_scales: dict[tuple[int, Target], Tensor] = field(default_factory=dict)
    """(layer, target) -> float32 [out_features]: m / ||W + s*BA|| per output, on base-without-bias plus LoRA."""
    biases: dict[tuple[int, Target], Tensor] = field(default_factory=dict)
    """(layer, target) -> [out_features], added to the output: lora_B's bias times scaling, or new minus base bias."""
    weights: dict[tuple[int, Target], Tensor] = field(default_factory=dict)
    """modules_to_save on a target: full weight [out_features, in_features] that replaces the base's."""
    norms: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """modules_to_save on a norm: (layer or -1 for the final norm, attribute name) -> weight."""
    embed_weight: Tensor | None = None
    """modules_to_save on embed_tokens: [vocab_size, hidden_size]."""
    embed_lora: tuple[Tensor, Tensor, float] | None = None
    """lora_embedding_A transposed to [vocab_size, r], lora_embedding_B transposed to [r, hidden_size], scaling."""
    embed_rows: tuple[Tensor, Tensor] | None = None
    """trainable_token_indices: sorted int64 token ids [n], their rows [n, hidden_size]."""
    lm_head_weight: Tensor | None = None
    """modules_to_save on lm_head (or on tied embeddings where PEFT ties it): [vocab_size, hidden_size]."""
    lm_head_lora: tuple[Tensor, Tensor, float] | None = None
    """A [r, hidden_size], B [r, vocab_size], scaling."""
    lm_head_rows: tuple[Tensor, Tensor] | None = None
    """trainable_token_indices seen through a tied lm_head: sorted token ids [n], their rows [n, hidden_size]."""
    lm_head_dora_scale: Tensor | None = None
    """float32 [vocab_size]."""
    lm_head_bias: Tensor | None = None
    """[vocab_size], added."""

    @property
    def num_bytes(self) -> int:
        """Memory of all parts."""
        tensors: list[Tensor] = []
        for part in (self.dora_scales, self.biases, self.weights, self.norms):
            tensors.extend(part.values())  # type: ignore[attr-defined]
        for single in (self.embed_weight, self.lm_head_weight, self.lm_head_dora_scale, self.lm_head_bias):
            if single is not None:
                tensors.append(single)
        for group in (self.embed_lora, self.embed_rows, self.lm_head_lora, self.lm_head_rows):
            if group is not None:
                tensors.extend(item for item in group if isinstance(item, Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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


def new_page_pool(layout: PageLayout, num_pages: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Allocate [num_pages, page_elems], zeroed so that no stale value is ever a NaN."""
    return torch.zeros((num_pages, layout.page_elems), dtype=dtype, device=device)

"""A PEFT adapter's files -> AdapterWeights: every tensor verified against the base model and the config, the low-rank
parts laid out in pages, the rest computed once into AdapterExtras. On the host; the runner copies the result.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.core.adapter import EMBEDDING_NAME, HEAD_NAME, BaseModules, ModuleLora, ResolvedAdapter
from pomona.core.errors import AdapterError
from pomona.kernels.cpu import binding
from pomona.kernels.host_memory import mapped_zeros
from pomona.kernels.linear import dense, is_served_as, unpack
from pomona.model.adapter_modules import ModuleMap, map_modules, norm_size
from pomona.model.adapter_state import AdapterState
from pomona.model.lora import AdapterExtras, PageLayout
from pomona.model.spec import Site, Target
from pomona.model.weights import DecoderWeights

_ROWS_AT_ONCE = 256
"""Rows of a base weight whose DoRA norm is computed at a time."""


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter in host memory, ready to be copied to the device."""

    pages: Tensor
    """[num_rank_pages, page_elems], the serving dtype; rows past a module's rank are zero."""
    ranks: NDArray[np.int32]
    """[num_layers, 7]; 0 where a target is not adapted."""
    scalings: NDArray[np.float32]
    """[num_layers, 7]."""
    extras: AdapterExtras | None
    """None if there is nothing but low-rank parts of projections."""
    lora_rank: int
    """The largest rank of any module, embedding and lm_head included."""
    modules: tuple[str, ...]
    """Kinds of module it changes, for people."""
    features: tuple[str, ...]
    """What it uses beyond plain LoRA, for people."""

    @property
    def num_bytes(self) -> int:
        """Host memory of all parts."""
        num_extra_bytes = 0 if self.extras is None else self.extras.num_bytes
        return self.pages.numel() * self.pages.element_size() + num_extra_bytes


class AdapterLoader:
    """Converts adapters for one base model. Thread-safe: it only reads the base."""

    def __init__(self, base: DecoderWeights, layout: PageLayout, max_pages: int | None = None) -> None:
        """Prepare for a base model.

        Args:
            base: its weights; DoRA's norms and the differences to its biases are computed from them.
            layout: the pages that adapters are laid out for.
            max_pages: adapters that need more are refused before memory is taken for them.
        """
        self._base = base
        self._layout = layout
        self._max_pages = max_pages
        self._map = map_modules(base.spec)

    @property
    def modules(self) -> BaseModules:
        """What an adapter's config must be resolved against."""
        return self._map.base

    def num_pages(self, weights: AdapterWeights) -> int:
        """Device pages an adapter occupies: its rank rows' own, and as many as its extras would fill; at least 1."""
        page_bytes = self._layout.page_elems * self._base.dtype.itemsize
        num_extra_bytes = 0 if weights.extras is None else weights.extras.num_bytes
        return max(1, weights.pages.shape[0] + math.ceil(num_extra_bytes / page_bytes))

    def load(self, adapter: ResolvedAdapter, tensors: dict[str, Tensor]) -> AdapterWeights:
        """Verify and convert one adapter.

        Args:
            adapter: its config, resolved against ``modules``.
            tensors: of its weights file, by key.

        Raises:
            AdapterError: naming the tensor that is missing, unexpected, of the wrong shape or type, or not finite, or
                the projection whose rank is too large.
        """
        self._check_ranks(adapter)
        state = AdapterState(tensors, adapter.spec.base_model_name)
        state.check_modules(self._map.base.names)
        parts = _Parts(adapter, state, self._base, self._map)
        with torch.no_grad():
            rows = parts.low_rank_rows()
            parts.add_saved_modules()
            parts.add_biases()
            parts.add_embedding()
            parts.add_head()
            state.check_all_taken()
            pages = self._fill_pages(rows)
        ranks = np.zeros((self._base.spec.num_layers, len(Target)), dtype=np.int32)
        scalings = np.zeros(ranks.shape, dtype=np.float32)
        for (layer, target), (lora, _, _) in rows.items():
            ranks[layer, target] = lora.lora_rank
            scalings[layer, target] = lora.scaling
        return AdapterWeights(
            pages=pages,
            ranks=ranks,
            scalings=scalings,
            extras=parts.extras if next(parts.extras.tensors(), None) is not None else None,
            lora_rank=max((lora.lora_rank for lora in adapter.loras.values()), default=0),
            modules=_module_kinds(adapter),
            features=_features(adapter),
        )

    def _check_ranks(self, adapter: ResolvedAdapter) -> None:
        """Refuse what the kernels of CPUs cannot compute: they do so for GPUs, too, while an adapter is on its way
        (``HostLora``). Embedding and lm_head are multiplied by other means."""
        for name in self._map.targets:
            lora = adapter.loras.get(name)
            if lora is not None and lora.lora_rank > binding.MAX_RANK:
                raise AdapterError(
                    f"the rank of {name} is {lora.lora_rank}: a projection's may be up to {binding.MAX_RANK}"
                )

    def _fill_pages(self, rows: "dict[tuple[int, Target], _LowRank]") -> Tensor:
        max_rank = max((lora.lora_rank for lora, _, _ in rows.values()), default=0)
        num_pages = math.ceil(max_rank / self._layout.rows_per_page)
        if self._max_pages is not None and num_pages > self._max_pages:
            raise AdapterError(
                f"rank {max_rank} needs {num_pages} adapter pages; there are {self._max_pages}: raise adapter_bytes"
            )
        pages = mapped_zeros((num_pages, self._layout.page_elems), self._base.dtype)
        for layer, site in itertools.product(range(self._base.spec.num_layers), Site):
            slices = self._layout.slices(pages, layer, site)
            for target, a_pages, b_pages in zip(site.value, slices.a, slices.b, strict=True):
                if (layer, target) in rows:
                    _, a, b = rows[layer, target]
                    _copy_rows(a, a_pages)
                    _copy_rows(b, b_pages)
        return pages


def _copy_rows(rows: Tensor, pages: Tensor) -> None:
    """Rank rows [r, features] into the first pages of [num_pages, rows_per_page, features]."""
    rows_per_page = pages.shape[1]
    num_full_pages = rows.shape[0] // rows_per_page
    num_full_rows = num_full_pages * rows_per_page
    pages[:num_full_pages] = rows[:num_full_rows].reshape(num_full_pages, rows_per_page, rows.shape[1])
    if num_full_rows < rows.shape[0]:
        pages[num_full_pages, : rows.shape[0] - num_full_rows] = rows[num_full_rows:]


_LowRank = tuple[ModuleLora, Tensor, Tensor]
"""Rank and scaling; A [r, in_features]; B transposed to [r, out_features]."""


class _Parts:
    """One adapter while it is loaded: takes tensors from ``state`` and gathers ``extras``."""

    def __init__(self, adapter: ResolvedAdapter, state: AdapterState, base: DecoderWeights, names: ModuleMap) -> None:
        self._adapter = adapter
        self._config = adapter.spec
        self._state = state
        self._base = base
        self._names = names
        self._table_shape = (base.spec.vocab_size, base.spec.hidden_size)
        self.extras = AdapterExtras()

    def low_rank_rows(self) -> dict[tuple[int, Target], _LowRank]:
        """A and B of every adapted projection, with their DoRA scales and lora_B biases put into ``extras``."""
        rows: dict[tuple[int, Target], _LowRank] = {}
        for name, key in self._names.targets.items():
            lora = self._adapter.loras.get(name)
            if lora is None:
                continue
            in_features, out_features = self._base.spec.target_shape(key[1])
            a = self._state.take(name, "lora_A", (lora.lora_rank, in_features))
            b = self._state.take(name, "lora_B", (out_features, lora.lora_rank))
            rows[key] = (lora, self._cast(a, f"lora_A of {name}"), self._cast(b, f"lora_B of {name}").T)
            if self._config.use_dora:
                weight = functools.partial(self._base.target_weight, *key)
                self.extras.dora_scales[key] = self._dora_scale(name, weight, (b, a), lora.scaling, dim=1)
            if self._config.lora_bias:
                lora_bias = self._state.take(name, "lora_B.bias", (out_features,))
                self.extras.biases[key] = lora_bias.float() * lora.scaling
        return rows

    def add_saved_modules(self) -> None:
        """Full weights of projections and norms; embedding and lm_head follow later."""
        for name in self._adapter.saved_modules:
            if name in self._names.targets:
                key = self._names.targets[name]
                in_features, out_features = self._base.spec.target_shape(key[1])
                weight = self._state.take(name, "weight", (out_features, in_features))
                self.extras.weights[key] = self._cast(weight, name)
                if self._base.spec.has_bias(key[1]):
                    self._add_bias_change(key, self._state.take(name, "bias", (out_features,)))
            elif name in self._names.norms:
                layer, norm = self._names.norms[name]
                weight = self._state.take(name, "weight", (norm_size(self._base.spec, norm),))
                self.extras.norms[layer, norm] = self._cast(weight, name)
            if self._config.bias == "all":
                # the unused original, and a second copy of what was just taken
                self._state.ignore(name, "original_module.bias")
                self._state.ignore(name, "modules_to_save.bias")

    def add_biases(self) -> None:
        """Biases of the base that bias="all" or "lora_only" trained; PEFT leaves out those that do not exist."""
        for name, key in self._names.targets.items():
            is_adapted = name in self._adapter.loras
            if name in self._adapter.saved_modules or not self._base.spec.has_bias(key[1]):
                continue
            if self._config.bias == "all" or (self._config.bias == "lora_only" and is_adapted):
                # before PEFT 0.7 an adapted module's bias was saved under the module's own name
                for part in ("base.bias", "bias"):
                    if self._state.has(name, part):
                        bias = self._state.take(name, part, (self._base.spec.target_shape(key[1])[1],))
                        self._add_bias_change(key, bias)

    def add_embedding(self) -> None:
        """Everything on embed_tokens."""
        extras, state = self.extras, self._state
        if EMBEDDING_NAME in self._adapter.saved_modules:
            extras.embed_weight = self._cast(state.take(EMBEDDING_NAME, "weight", self._table_shape), EMBEDDING_NAME)
        else:
            extras.embed_weight = self._table_saved_along(EMBEDDING_NAME)
        lora = self._adapter.loras.get(EMBEDDING_NAME)
        if lora is not None:
            vocab_size, hidden_size = self._table_shape
            a = state.take(EMBEDDING_NAME, "lora_embedding_A", (lora.lora_rank, vocab_size))
            b = state.take(EMBEDDING_NAME, "lora_embedding_B", (hidden_size, lora.lora_rank))
            if self._config.use_dora:
                table = self._base.embed if extras.embed_weight is None else dense(extras.embed_weight)
                weight = functools.partial(unpack, table)
                extras.embed_dora_scale = self._dora_scale(EMBEDDING_NAME, weight, (a.T, b.T), lora.scaling, dim=0)
            extras.embed_lora = (
                self._cast(a, f"lora_embedding_A of {EMBEDDING_NAME}").T.contiguous(),
                self._cast(b, f"lora_embedding_B of {EMBEDDING_NAME}").T.contiguous(),
                lora.scaling,
            )
        extras.embed_rows = self._token_rows(EMBEDDING_NAME)

    def add_head(self) -> None:
        """Everything on lm_head, which may be what was done to the embedding; ``add_embedding`` comes first."""
        extras, state, follows = self.extras, self._state, self._adapter.head_follows
        if HEAD_NAME not in self._adapter.saved_modules:
            extras.lm_head_weight = self._table_saved_along(HEAD_NAME)
            self._share_tied_table()
        elif follows == "saved_module":
            extras.lm_head_weight = extras.embed_weight
            if state.has(HEAD_NAME, "weight"):
                weight = self._cast(state.take(HEAD_NAME, "weight", self._table_shape), HEAD_NAME)
                self._check_same(weight, extras.embed_weight)
        else:
            extras.lm_head_weight = self._cast(state.take(HEAD_NAME, "weight", self._table_shape), HEAD_NAME)
        lora = self._adapter.loras.get(HEAD_NAME)
        if lora is not None:
            self._add_head_lora(lora)
        extras.lm_head_rows = extras.embed_rows if follows == "tokens" else self._token_rows(HEAD_NAME)

    def _add_head_lora(self, lora: ModuleLora) -> None:
        extras, state = self.extras, self._state
        vocab_size, hidden_size = self._table_shape
        is_tied = self._adapter.head_follows == "lora"
        if is_tied and not state.has(HEAD_NAME, "lora_A"):
            assert extras.embed_lora is not None
            b, a, _ = extras.embed_lora
        else:
            a = state.take(HEAD_NAME, "lora_A", (lora.lora_rank, hidden_size))
            b = state.take(HEAD_NAME, "lora_B", (vocab_size, lora.lora_rank))
        a_cast = self._cast(a, f"lora_A of {HEAD_NAME}").contiguous()
        b_cast = self._cast(b, f"lora_B of {HEAD_NAME}").contiguous()
        if is_tied:
            assert extras.embed_lora is not None
            self._check_same(a_cast, extras.embed_lora[1])
            self._check_same(b_cast, extras.embed_lora[0])
        extras.lm_head_lora = (a_cast, b_cast, lora.scaling)
        if self._config.use_dora:
            table = self._base.lm_head if extras.lm_head_weight is None else dense(extras.lm_head_weight)
            weight = functools.partial(unpack, table)
            extras.lm_head_dora_scale = self._dora_scale(HEAD_NAME, weight, (b, a), lora.scaling, dim=1)
        if self._config.lora_bias:
            lora_bias = state.take(HEAD_NAME, "lora_B.bias", (vocab_size,))
            extras.lm_head_bias = lora_bias.float() * lora.scaling

    def _table_saved_along(self, name: str) -> Tensor | None:
        """The base's own embedding or lm_head, which PEFT saves along with some adapters; None unless it differs.

        On loading, PEFT writes it into the base model, so a table that differs is part of the adapter.
        """
        for part in ("base.weight", "weight"):
            if self._state.has(name, part):
                table = self._cast(self._state.take(name, part, self._table_shape), name)
                base_table = self._base.embed if name == EMBEDDING_NAME else self._base.lm_head
                return None if is_served_as(table, base_table) else table
        return None

    def _share_tied_table(self) -> None:
        """A table that replaces one of two tied ones replaces both, for in PEFT they are one parameter."""
        extras, saved = self.extras, self._adapter.saved_modules
        if not self._base.spec.is_tied:
            return
        if extras.lm_head_weight is None and EMBEDDING_NAME not in saved:
            extras.lm_head_weight = extras.embed_weight
        elif extras.embed_weight is None:
            extras.embed_weight = extras.lm_head_weight
        elif EMBEDDING_NAME not in saved:
            self._check_same(extras.lm_head_weight, extras.embed_weight)

    def _token_rows(self, name: str) -> tuple[Tensor, Tensor] | None:
        token_ids = self._adapter.token_indices.get(name)
        if token_ids is None:
            return None
        vocab_size, hidden_size = self._table_shape
        if max(token_ids) >= vocab_size:
            raise AdapterError(
                f"trainable_token_indices holds {max(token_ids)}, but the base model's vocabulary has {vocab_size} "
                f"tokens; adapters that add tokens are not supported"
            )
        rows = self._cast(self._state.take(name, "tokens", (len(token_ids), hidden_size)), f"token rows of {name}")
        sorted_ids, order = torch.sort(torch.tensor(token_ids, dtype=torch.int64))
        return sorted_ids, rows[order]

    def _add_bias_change(self, key: tuple[int, Target], new_bias: Tensor) -> None:
        old_bias = self._base.target_bias(*key)
        assert old_bias is not None
        change = new_bias.float() - old_bias.cpu().float()
        self.extras.biases[key] = self.extras.biases[key] + change if key in self.extras.biases else change

    def _dora_scale(
        self, name: str, weight: Callable[[slice], Tensor], factors: tuple[Tensor, Tensor], scaling: float, dim: int
    ) -> Tensor:
        """Magnitude over norm of the adapted weight (DoRA, arXiv 2402.09353, equation 5), float32.

        In pieces: the plan of a device's memory has no room for float32 copies of a whole weight.
        """
        left, right = (factor.float() for factor in factors)
        pieces = []
        for start in range(0, left.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            part = weight(rows)
            adapted = (left[rows] @ right).mul_(scaling).to(part.device).add_(part)
            pieces.append(torch.linalg.vector_norm(adapted, dim=dim).cpu())
        norm: Tensor = torch.cat(pieces) if dim == 1 else torch.linalg.vector_norm(torch.stack(pieces), dim=0)
        scale: Tensor = self._state.take(name, "lora_magnitude_vector", norm.shape).float() / norm
        if not torch.isfinite(scale).all():
            raise AdapterError(f"the DoRA norm of {name} is zero or not finite for this base model")
        return scale

    def _cast(self, tensor: Tensor, what: str) -> Tensor:
        """To the serving dtype, which must be able to hold it."""
        cast: Tensor = tensor.to(self._base.dtype)
        if cast is not tensor and not torch.isfinite(cast).all():
            raise AdapterError(f"{what} holds values too large for {str(self._base.dtype).removeprefix('torch.')}")
        return cast

    def _check_same(self, head: Tensor | None, embedding: Tensor | None) -> None:
        assert head is not None
        assert embedding is not None
        if not torch.equal(head, embedding):
            raise AdapterError("the weights of embed_tokens and lm_head are tied in this base model, but differ here")


def _module_kinds(adapter: ResolvedAdapter) -> tuple[str, ...]:
    names = (*adapter.loras, *adapter.saved_modules, *adapter.token_indices)
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _features(adapter: ResolvedAdapter) -> tuple[str, ...]:
    spec = adapter.spec
    used = {
        "rslora": spec.use_rslora,
        "dora": spec.use_dora,
        "rank_pattern": bool(spec.rank_pattern),
        "alpha_pattern": bool(spec.alpha_pattern),
        "bias": spec.bias != "none",
        "lora_bias": spec.lora_bias,
        "modules_to_save": bool(adapter.saved_modules),
        "embedding_lora": EMBEDDING_NAME in adapter.loras,
        "lm_head_lora": HEAD_NAME in adapter.loras,
        "trainable_tokens": bool(adapter.token_indices),
        "weight_tying": adapter.head_follows != "nothing",
    }
    return tuple(name for name, is_used in used.items() if is_used)

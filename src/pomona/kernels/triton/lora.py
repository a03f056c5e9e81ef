"""The adapters' part of a projection on a GPU: two launches per site, whatever the mix of adapters.

No atomics: equal inputs give equal bits. A row's result is the same, bit for bit, whatever shares its batch, as long
as the batch's number of tokens and its largest rank fall into the same shape classes of ``configs.json``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices
from pomona.kernels.reference import lora as reference
from pomona.kernels.triton.configs import Config, config_for
from pomona.kernels.triton.launch import Launch
from pomona.kernels.triton.lora_kernels import expand_kernel, shrink_kernel
from pomona.kernels.triton.lora_plan import ChunkPlan, plan_of, refresh_plan, reserve_plan

# Of float32 dots: bfloat16 never makes one, float16 fits tf32 exactly, float32 is worth three passes.
_PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "tf32x3"}

_SMALLEST_TILE = 16
"""Least extent of a tensor core product."""

_RANK_PADDING = 32
"""Rows of the intermediate have room for a multiple of this."""


@dataclass(frozen=True, eq=False)
class _Site:
    """A site's pages as the kernels take them."""

    slices: LoraSlices
    a_page_strides: tuple[int, ...]
    b_page_strides: tuple[int, ...]
    widths: tuple[int, ...]
    in_features: int
    out_features: int
    rows_per_page: int
    dtype: torch.dtype


def _next_power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _rank_tile(config: Config, max_rank: int) -> int:
    return max(_SMALLEST_TILE, min(config["max_block_r"], _next_power(max_rank)))


def _site_of(slices: LoraSlices) -> _Site:
    """The site's plan, made at its first use and kept with it: pages never move."""
    site: _Site | None = slices.__dict__.get("_triton_site")
    if site is None:
        first = slices.a[0]
        for pages in (*slices.a, *slices.b):
            assert pages.dtype is first.dtype
            assert pages.shape[1] == first.shape[1]
            assert pages.stride()[1:] == (pages.shape[2], 1), "the rank rows of a page must be dense"
        assert all(pages.shape[2] == first.shape[2] for pages in slices.a)
        widths = tuple(pages.shape[2] for pages in slices.b)
        site = slices.__dict__["_triton_site"] = _Site(
            slices=slices,
            a_page_strides=tuple(pages.stride(0) for pages in slices.a),
            b_page_strides=tuple(pages.stride(0) for pages in slices.b),
            widths=widths,
            in_features=first.shape[2],
            out_features=sum(widths),
            rows_per_page=first.shape[1],
            dtype=first.dtype,
        )
    return site


def _is_idle(ranks: LoraRanks) -> bool:
    """True if no segment adapts this site; looked up at the first use and kept with the ranks."""
    known: bool | None = ranks.__dict__.get("_triton_is_idle")
    if known is None:
        assert ranks.ranks.dtype is torch.int32
        assert ranks.ranks.is_contiguous()
        assert ranks.scalings.dtype is torch.float32
        assert ranks.scalings.is_contiguous()
        known = ranks.__dict__["_triton_is_idle"] = not any(any(of_slice) for of_slice in ranks.host_ranks)
    return known


def shrink_launch(x: Tensor, site: _Site, ranks: LoraRanks, batch: LoraBatch) -> tuple[Launch, Tensor]:
    """The first half, and where it leaves its result.

    Args:
        x: [num_tokens, in_features], rows dense.
        site: the site's pages.
        ranks: see ``kernels.lora``.
        batch: see ``kernels.lora``.

    Returns:
        The launch and float32 [num_splits, num_slices, num_tokens, batch.max_rank, rounded up]: partial sums.
    """
    num_tokens, in_features = x.shape
    assert in_features == site.in_features
    assert x.dtype is site.dtype
    plan = plan_of(batch, num_tokens)
    num_slices = len(site.widths)
    config = config_for(
        "lora_shrink",
        x.device,
        num_tokens=num_tokens,
        in_features=in_features,
        max_rank=batch.max_rank,
        element_bytes=x.element_size(),
    )
    block_k = min(config["block_k"], max(_SMALLEST_TILE, _next_power(in_features)))
    block_r = _rank_tile(config, batch.max_rank)
    num_tiles = -(-in_features // block_k)
    tiles_per_split = -(-num_tiles // config["max_splits"])
    num_splits = -(-num_tiles // tiles_per_split)
    padded_rank = -(-batch.max_rank // _RANK_PADDING) * _RANK_PADDING
    v = torch.empty((num_splits, num_slices, num_tokens, padded_rank), dtype=torch.float32, device=x.device)
    launch = Launch(
        kernel=shrink_kernel,
        grid=(plan.chunks.shape[0], num_splits * -(-batch.max_rank // block_r), num_slices),
        args=(
            *(x, v, site.slices.a, site.a_page_strides, ranks.ranks, batch.page_tables, plan.chunks, in_features),
            *(ranks.ranks.shape[1], batch.page_tables.shape[1], batch.max_rank),
            *(x.stride(0), v.stride(2), v.stride(1), v.stride(0), tiles_per_split),
        ),
        constants={
            "NUM_SLICES": num_slices,
            "ROWS_PER_PAGE": site.rows_per_page,
            "BLOCK_M": plan.rows_per_chunk,
            "BLOCK_K": block_k,
            "BLOCK_R": block_r,
            "IS_EVEN_K": in_features % block_k == 0,
            "IS_PADDED": padded_rank % block_r == 0,
            "PRECISION": _PRECISIONS[site.dtype],
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return launch, v


def expand_launch(v: Tensor, site: _Site, ranks: LoraRanks, batch: LoraBatch, out: Tensor) -> Launch:
    """The second half, which adds up partial sums while it reads them.

    Args:
        v: of ``shrink_launch``, or with one split.
        site: the site's pages.
        ranks: see ``kernels.lora``.
        batch: see ``kernels.lora``.
        out: [num_tokens, sum of widths], rows dense; changed in place.
    """
    num_tokens = out.shape[0]
    assert out.shape[1] == site.out_features
    assert out.dtype is site.dtype
    num_splits, num_slices = v.shape[:2]
    assert v.shape[1:3] == (len(site.widths), num_tokens)
    assert v.shape[3] >= batch.max_rank
    assert v.dtype is torch.float32
    assert v.stride(3) == 1
    plan: ChunkPlan = plan_of(batch, num_tokens)
    config = config_for(
        "lora_expand",
        out.device,
        num_tokens=num_tokens,
        out_features=site.out_features,
        max_rank=batch.max_rank,
        element_bytes=out.element_size(),
    )
    block_n = min(config["block_n"], max(_SMALLEST_TILE, _next_power(max(site.widths))))
    block_r = _rank_tile(config, batch.max_rank)
    return Launch(
        kernel=expand_kernel,
        grid=(plan.chunks.shape[0], sum(-(-width // block_n) for width in site.widths)),
        args=(
            *(v, out, site.slices.b, site.b_page_strides, site.widths, ranks.ranks, ranks.scalings, batch.page_tables),
            *(plan.chunks, ranks.ranks.shape[1], batch.page_tables.shape[1]),
            *(out.stride(0), v.stride(2), v.stride(1), v.stride(0)),
        ),
        constants={
            "NUM_SLICES": num_slices,
            "NUM_SPLITS": num_splits,
            "ROWS_PER_PAGE": site.rows_per_page,
            "BLOCK_M": plan.rows_per_chunk,
            "BLOCK_N": block_n,
            "BLOCK_R": block_r,
            "IS_EVEN_N": all(width % block_n == 0 for width in site.widths),
            "IS_PADDED": v.shape[3] % block_r == 0,
            "PRECISION": _PRECISIONS[site.dtype],
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _dense_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def plan_launches(
    out: Tensor, x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch
) -> tuple[Launch, Launch]:
    """Both halves of ``lora`` for a site that some segment adapts; ``out`` must have dense rows."""
    site = _site_of(slices)
    shrink, v = shrink_launch(_dense_rows(x), site, ranks, batch)
    return shrink, expand_launch(v, site, ranks, batch, out)


def lora(out: Tensor, x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch) -> None:
    """See ``kernels.lora.lora``."""
    if _is_idle(ranks):
        return
    if slices.a[0].dtype not in _PRECISIONS or out.stride(1) != 1:
        reference.lora(out, x, slices, ranks, batch)
        return
    for launch in plan_launches(out, x, slices, ranks, batch):
        launch.run()


adapted_linear = reference.adapted_linear


def lora_shrink(x: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch) -> Tensor:
    """See ``kernels.lora.lora_shrink``."""
    if slices.a[0].dtype not in _PRECISIONS:
        return reference.lora_shrink(x, slices, ranks, batch)
    launch, v = shrink_launch(_dense_rows(x), _site_of(slices), ranks, batch)
    launch.run()
    whole = v[0] if v.shape[0] == 1 else v.sum(0)
    return whole[..., : batch.max_rank]


def lora_expand(v: Tensor, slices: LoraSlices, ranks: LoraRanks, batch: LoraBatch, out: Tensor) -> None:
    """See ``kernels.lora.lora_expand``."""
    if slices.a[0].dtype not in _PRECISIONS or out.stride(1) != 1:
        reference.lora_expand(v, slices, ranks, batch, out)
    elif not _is_idle(ranks):
        expand_launch(v.unsqueeze(0), _site_of(slices), ranks, batch, out).run()


def can_shift_pages(pool: Tensor) -> bool:
    """See ``kernels.lora.can_shift_pages``."""
    return False


def reserve(batch: LoraBatch, num_tokens: int) -> None:
    """See ``kernels.lora.reserve``."""
    reserve_plan(batch, num_tokens)


def carry_plan(batch: LoraBatch, renewed: LoraBatch) -> None:
    """See ``kernels.lora.renew``."""
    plan = batch.__dict__.get("_triton_plan")
    if plan is not None:
        renewed.__dict__["_triton_plan"] = plan
        refresh_plan(plan, renewed.host_rows)

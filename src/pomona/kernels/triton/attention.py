"""Paged attention on a GPU: one launch per class of sequences (decodes, chunks), one more where KV ranges are merged.

A row's result is the same, bit for bit, whatever other sequences share its step. How its own prompt is cut into chunks
may change its last bits, but only where chunks fall into different classes of ``configs.json``, hence different tiles.
"""

import math

import torch
from torch import Tensor

from pomona.kernels.attention import AttentionBatch, DecodeShape
from pomona.kernels.reference import attention as reference
from pomona.kernels.triton.attention_kernels import attend_kernel, merge_kernel, write_kv_kernel
from pomona.kernels.triton.attention_plan import ClassPlan, HeadShape, plans_of, refresh_plan, reserve_plan
from pomona.kernels.triton.configs import config_for
from pomona.kernels.triton.launch import Launch

_PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "tf32x3"}

_SMALLEST_TILE = 16
"""Least extent of a tensor core product."""


def _is_dense_block(cache: Tensor) -> bool:
    _, _, num_kv_heads, head_dim = cache.shape
    return cache.stride()[1:] == (num_kv_heads * head_dim, head_dim, 1)


def _dense_heads(heads: Tensor) -> Tensor:
    """[num_tokens, num_heads, head_dim] with only the first stride free."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


def write_kv_launch(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> Launch:
    """See ``kernels.attention.write_kv``."""
    assert _is_dense_block(key_cache)
    assert _is_dense_block(value_cache)
    assert slot_mapping.dtype is torch.int64
    assert slot_mapping.is_contiguous()
    key, value = _dense_heads(key), _dense_heads(value)
    num_tokens, num_kv_heads, head_dim = key.shape
    width = num_kv_heads * head_dim
    config = config_for("write_kv", key.device, kv_width=width)
    return Launch(
        kernel=write_kv_kernel,
        grid=(num_tokens,),
        args=(
            *(key, value, key_cache, value_cache, slot_mapping),
            *(key.stride(0), value.stride(0), key_cache.stride(0), value_cache.stride(0)),
        ),
        constants={"WIDTH": width, "BLOCK_SIZE": key_cache.shape[1], "BLOCK_W": 1 << (width - 1).bit_length()},
        num_warps=config["num_warps"],
        num_stages=1,
    )


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """See ``kernels.attention.write_kv``."""
    write_kv_launch(key, value, key_cache, value_cache, slot_mapping).run()


def _class_launches(
    query: Tensor, caches: tuple[Tensor, Tensor], out: Tensor, batch: AttentionBatch, plan: ClassPlan, scale: float
) -> list[Launch]:
    """The launches of one class, without a window's: see ``attention_launches``."""
    key_cache, value_cache = caches
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    partial_shape = (plan.num_partials, num_kv_heads, plan.num_lanes)
    partial = torch.empty((*partial_shape, head_dim), dtype=torch.float32, device=query.device)
    stats = torch.empty((*partial_shape, 2), dtype=torch.float32, device=query.device)
    block_d = max(_SMALLEST_TILE, 1 << (head_dim - 1).bit_length())
    shared = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": query.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
    }
    window = plan.window or 0
    attend = Launch(
        kernel=attend_kernel,
        grid=(plan.items.shape[0], num_kv_heads),
        args=(
            *(query, key_cache, value_cache, out, partial, stats, plan.items, batch.block_tables),
            *(scale * math.log2(math.e), window, query.stride(0)),
            *(key_cache.stride(0), value_cache.stride(0), batch.block_tables.shape[1], plan.num_lanes),
        ),
        constants={
            **shared,
            "BLOCK_SIZE": block_size,
            "BLOCK_M": plan.block_m,
            "BLOCK_N": plan.config["block_n"],
            "HAS_WINDOW": plan.window is not None,
            "PRECISION": _PRECISIONS[query.dtype],
        },
        num_warps=plan.config["num_warps"],
        num_stages=plan.config["num_stages"],
    )
    if plan.merges.shape[0] == 0:
        return [attend]
    config = config_for("attention_merge", query.device, head_dim=head_dim)
    merge = Launch(
        kernel=merge_kernel,
        grid=(plan.merges.shape[0], num_kv_heads, plan.num_lanes),
        args=(out, partial, stats, plan.merges, plan.num_lanes),
        constants={**shared, "BLOCK_S": config["block_splits"]},
        num_warps=config["num_warps"],
        num_stages=1,
    )
    return [attend, merge]


def attention_launches(
    query: Tensor,
    caches: tuple[Tensor, Tensor],
    out: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None,
) -> list[Launch]:
    """All launches of one layer.

    Args:
        query: [num_tokens, num_heads, head_dim], heads dense.
        caches: keys and values, see ``kernels.attention``.
        out: [num_tokens, num_heads, head_dim], contiguous; every element is written.
        batch: the step's sequences.
        scale: factor on the scores.
        sliding_window: see ``kernels.attention``.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = caches[0].shape[2]
    assert num_heads % num_kv_heads == 0
    assert num_tokens == sum(batch.host_query_lens)
    assert all(_is_dense_block(cache) and cache.dtype is query.dtype for cache in caches)
    heads = HeadShape(num_heads // num_kv_heads, head_dim, query.element_size(), sliding_window)
    return [
        launch for plan in plans_of(batch, heads) for launch in _class_launches(query, caches, out, batch, plan, scale)
    ]


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """See ``kernels.attention.paged_attention``."""
    if query.dtype not in _PRECISIONS:
        return reference.paged_attention(
            query, key_cache, value_cache, batch, scale=scale, sliding_window=sliding_window
        )
    query = _dense_heads(query)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for launch in attention_launches(
        query, (key_cache, value_cache), out, batch, scale=scale, sliding_window=sliding_window
    ):
        launch.run()
    return out


def reserve(batch: AttentionBatch, shape: DecodeShape, max_kv_tokens: int) -> None:
    """See ``kernels.attention.reserve``."""
    group = shape.num_heads // shape.num_kv_heads
    reserve_plan(batch, HeadShape(group, shape.head_dim, shape.dtype.itemsize, shape.sliding_window), max_kv_tokens)


def carry_plan(batch: AttentionBatch, renewed: AttentionBatch) -> None:
    """See ``kernels.attention.renew``."""
    plans: dict[HeadShape, tuple[ClassPlan, ...]] = batch.__dict__.get("_triton_plans", {})
    for heads, (plan,) in plans.items():
        refresh_plan(plan, renewed, heads)
    renewed.__dict__["_triton_plans"] = plans

"""Dense layers on a GPU: torch's own products for weights in the serving dtype, Triton kernels for int8 ones."""

import torch
from torch import Tensor

from pomona.kernels.linear import Layout, PackedWeight, QuantizedWeight
from pomona.kernels.reference import linear as reference
from pomona.kernels.triton.configs import config_for
from pomona.kernels.triton.launch import Launch
from pomona.kernels.triton.linear_kernels import int8_row_kernel, int8_tile_kernel

# Of float32 dots: bfloat16 and float16 make none, float32 is worth three passes.
_PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "tf32x3"}


def pack(weight: Tensor | QuantizedWeight) -> PackedWeight:
    """See ``kernels.linear.pack``."""
    return reference.pack(weight)


def gather_rows(packed: PackedWeight, row_ids: Tensor) -> Tensor:
    """See ``kernels.linear.gather_rows``."""
    return reference.gather_rows(packed, row_ids)


def int8_launch(x: Tensor, packed: PackedWeight, bias: Tensor | None, out: Tensor) -> Launch:
    """One product with an int8 weight.

    Args:
        x: [num_tokens, in_features], rows dense; at least one.
        packed: quantized, in the dense layout.
        bias: [out_features] or None.
        out: [num_tokens, out_features], contiguous.
    """
    num_tokens = x.shape[0]
    config = config_for("int8_linear", x.device, num_tokens=num_tokens, element_bytes=x.element_size())
    block_n = config["block_n"]
    num_tiles = -(-packed.out_features // block_n)
    constants: dict[str, int | str] = {
        "IN_FEATURES": packed.in_features,
        "BLOCK_N": block_n,
        "BLOCK_K": config["block_k"],
        "HAS_BIAS": bias is not None,
    }
    inputs = (x, packed.data, packed.scales, out if bias is None else bias, out)
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    if config["block_m"] == 1:
        sizes: tuple[int, ...] = (packed.out_features, x.stride(0))
        return Launch(int8_row_kernel, (num_tiles, num_tokens), (*inputs, *sizes), constants, **options)
    constants |= {"BLOCK_M": config["block_m"], "PRECISION": _PRECISIONS[x.dtype]}
    sizes = (num_tokens, packed.out_features, x.stride(0))
    grid = (-(-num_tokens // config["block_m"]), num_tiles)
    return Launch(int8_tile_kernel, grid, (*inputs, *sizes), constants, **options)


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See ``kernels.linear.packed_linear``."""
    is_ours = packed.scales is not None and packed.layout is Layout.DENSE and x.dtype in _PRECISIONS
    if not is_ours or (bias is not None and not bias.is_contiguous()):
        return reference.packed_linear(x, packed, bias, out_dtype=out_dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((x.shape[0], packed.out_features), dtype=out_dtype or x.dtype, device=x.device)
    if x.shape[0]:
        int8_launch(x, packed, bias, out).run()
    return out

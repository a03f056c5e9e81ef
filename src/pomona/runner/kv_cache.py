"""KV blocks on the device. Who owns which block is the scheduler's business."""

import numpy as np
import torch
from torch import Tensor

from pomona.kernels.cpu.binding import prefer_huge_pages
from pomona.model.spec import ModelSpec


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one KV block over all layers, keys and values."""
    return spec.num_layers * 2 * block_size * spec.kv_size * dtype.itemsize


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose host memory is only taken when first written (the operating system's zero pages)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    zeros = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))
    prefer_huge_pages(zeros)
    return zeros.view(dtype).view(shape)


class KVCache:
    """The KV blocks of every layer.

    ``layers[i]`` is (keys, values), each [num_blocks, block_size, num_kv_heads, head_dim].
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_layers, 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        # Zeros, not empty: masked positions are multiplied by probability zero, and 0 * NaN would be NaN.
        self._storage: Tensor = lazy_zeros(shape, dtype=dtype, device=device)
        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple(
            (self._storage[layer, 0], self._storage[layer, 1]) for layer in range(spec.num_layers)
        )

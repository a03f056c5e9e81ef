"""KV blocks on the device. Who owns which block is the scheduler's business."""

import threading

import torch
from torch import Tensor

from pomona.kernels.host_memory import mapped_zeros, prefer_huge_pages, take_memory
from pomona.model.spec import ModelSpec

_LOT_BYTES = 2 * 2**20
"""A layer's keys, or values, are given memory by huge pages: what one step's new block costs is 2 MiB in each."""
_NUM_LOTS_AHEAD = 2


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one KV block over all layers, keys and values."""
    return spec.num_layers * 2 * block_size * spec.kv_size * dtype.itemsize


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose host memory is only taken when first written (the operating system's zero pages)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    zeros = mapped_zeros(shape, dtype)
    prefer_huge_pages(zeros)
    return zeros


class KVCache:
    """The KV blocks of every layer.

    ``layers[i]`` is (keys, values), each [num_blocks, block_size, num_kv_heads, head_dim].

    On a CPU memory is taken as blocks come into use, a lot of them at a time and ahead of the steps, on a thread: taken
    by the step that first writes there, in every layer at once, it would hold up everybody.
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
        self._num_blocks = num_blocks
        self._num_taken = 0 if device.type == "cpu" else num_blocks
        self._lot = max(1, _LOT_BYTES * num_blocks // max(1, self._storage[0, 0].nbytes))
        self._thread: threading.Thread | None = None

    def use(self, block_id: int) -> None:
        """Blocks up to this one are in use: take memory for those that come next."""
        if self._num_taken == self._num_blocks or (self._thread is not None and self._thread.is_alive()):
            return
        num_blocks = min(self._num_blocks, (block_id // self._lot + _NUM_LOTS_AHEAD) * self._lot)
        if num_blocks > self._num_taken:
            first, self._num_taken = self._num_taken, num_blocks
            self._thread = threading.Thread(target=self._take, args=(first, num_blocks), name="pomona-kv", daemon=True)
            self._thread.start()

    def _take(self, first: int, end: int) -> None:
        for layer in self.layers:
            for blocks in layer:
                take_memory(blocks[first:end])

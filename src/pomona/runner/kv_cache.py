"""KV blocks on the device, and the adapter pages among them. Who owns which is the scheduler's business."""

import contextlib
import threading

import torch
from torch import Tensor

from pomona.kernels.host_memory import mapped_zeros, prefer_huge_pages, take_memory
from pomona.model.spec import ModelSpec

_LOT_BYTES = 32 * 2**20
_NUM_LOTS_AHEAD = 2


def block_elems(spec: ModelSpec, block_size: int) -> int:
    """Elements of one KV block over all layers, keys and values."""
    return spec.num_layers * 2 * block_size * spec.kv_size


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one KV block over all layers, keys and values."""
    return block_elems(spec, block_size) * dtype.itemsize


def lazy_zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose host memory is only taken when first written (the operating system's zero pages)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    zeros = mapped_zeros(shape, dtype)
    prefer_huge_pages(zeros)
    return zeros


class KVCache:
    """Memory in equal blocks, each of which holds the KV of all layers: [num_layers, 2, block_size, num_kv_heads,
    head_dim], and of which several in a row may be an adapter page instead.

    ``layers[i]`` is (keys, values), each [num_blocks, block_size, num_kv_heads, head_dim]; the block stride is a
    block's size.

    On a CPU memory is taken as blocks come into use, a lot of them at a time and ahead of the steps, on a thread: taken
    by the step that first writes there, it would hold up everybody.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._block_elems = block_elems(spec, block_size)
        # Zeros, not empty: nothing that is not finite is ever where a kernel may multiply it by zero.
        self._blocks: Tensor = lazy_zeros((num_blocks, self._block_elems), dtype=dtype, device=device)
        shape = (num_blocks, spec.num_layers, 2, block_size, spec.num_kv_heads, spec.head_dim)
        parts = self._blocks.view(shape)
        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple(
            (parts[:, layer, 0], parts[:, layer, 1]) for layer in range(spec.num_layers)
        )
        self._num_blocks = num_blocks
        self._num_taken = 0 if device.type == "cpu" else num_blocks
        self._lot = max(1, _LOT_BYTES // (self._block_elems * dtype.itemsize))
        self._thread: threading.Thread | None = None

    def pages(self, first_block: int, num_pages: int, blocks_per_page: int, page_elems: int) -> Tensor:
        """Blocks from ``first_block`` on, seen as adapter pages [num_pages, page_elems]; the row stride is that of
        ``blocks_per_page`` blocks."""
        blocks = self._blocks[first_block : first_block + num_pages * blocks_per_page]
        return blocks.view(num_pages, blocks_per_page * self._block_elems)[:, :page_elems]

    def use(self, block_id: int) -> None:
        """Blocks up to this one are in use: take memory for those that come next."""
        if self._num_taken == self._num_blocks or (self._thread is not None and self._thread.is_alive()):
            return
        num_blocks = min(self._num_blocks, (block_id // self._lot + _NUM_LOTS_AHEAD) * self._lot)
        if num_blocks > self._num_taken:
            blocks, self._num_taken = self._blocks[self._num_taken : num_blocks], num_blocks
            self._thread = threading.Thread(target=take_memory, args=(blocks,), name="pomona-kv", daemon=True)
            with contextlib.suppress(RuntimeError):  # without a thread, memory is taken when it is first written
                self._thread.start()

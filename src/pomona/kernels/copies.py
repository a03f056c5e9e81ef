"""Copies between host and device for which nobody waits: neither the host for the device, nor the other way round.

On a CPU there is nothing to copy. On CUDA both directions go through page-locked memory, which PyTorch keeps until the
copy has been made.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array on the device, in stream order; on a CPU a tensor that shares its memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class Download:
    """Tensors on their way to the host."""

    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None
    """Recorded after the last copy; None if there was nothing to copy."""

    @staticmethod
    def of(*tensors: Tensor) -> "Download":
        """Begin to copy tensors of one device."""
        if tensors[0].device.type == "cpu":
            return Download(tensors, None)
        copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return Download(copies, copied)

    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """The values, once they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return tuple(tensor.numpy() for tensor in self.tensors)

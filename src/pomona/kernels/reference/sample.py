"""Greedy choice in plain torch."""

import torch
from torch import Tensor


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.sample.greedy``. One reduction finds both NaN, which amax propagates, and infinities."""
    return logits.argmax(dim=1), torch.isfinite(logits.abs().amax(dim=1))

"""Greedy choice by the compiled kernels."""

import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.reference import sample as reference


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.sample.greedy``."""
    if logits.dtype is not torch.float32 or logits.stride(1) != 1:
        return reference.greedy(logits)
    num_rows, vocab_size = logits.shape
    token_ids, is_finite = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.bool)
    binding.library().pomona_greedy(
        *(torch.get_num_threads(), logits.data_ptr(), num_rows, vocab_size, logits.stride(0)),
        *(token_ids.data_ptr(), is_finite.data_ptr()),
    )
    return token_ids, is_finite

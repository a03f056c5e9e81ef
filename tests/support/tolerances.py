"""How far a kernel may be from the float64 truth, by dtype: one table for all parity tests."""

import torch
from torch import Tensor

# dtype -> (relative, absolute), for inputs of magnitude about 1 and sums of a few hundred products.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}

LOGITS_ATOL = 1e-4
"""Float32 logits of magnitude 1 to 10 against transformers."""


def assert_close(actual: Tensor, expected: Tensor, allowance: Tensor | None = None) -> None:
    """Compare against a reference of higher precision, by the actual tensor's dtype.

    Args:
        actual: what a kernel made.
        expected: the truth.
        allowance: float64 like ``actual``, how much further each element may be off; None is nothing.
    """
    rtol, atol = TOLERANCES[actual.dtype]
    wide = actual.double()
    if allowance is not None:
        wide = wide + (expected.double() - wide).clamp(-allowance, allowance)
    torch.testing.assert_close(wide, expected.double(), rtol=rtol, atol=atol)

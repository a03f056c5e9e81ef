"""The gated activation of the MLP (SwiGLU, arXiv 2002.05202)."""

from torch import Tensor

from pomona.kernels.dispatch import backend_for


def silu_mul(gate_up: Tensor) -> Tensor:
    """Semantics: ``silu(gate) * up`` where gate is the first half of the last dimension and up the second.

    Args:
        gate_up: [num_tokens, 2 * features], not changed.

    Returns:
        [num_tokens, features], gate_up's dtype, contiguous.
    """
    assert gate_up.shape[-1] % 2 == 0
    result: Tensor = backend_for("activation", gate_up.device).silu_mul(gate_up)
    return result

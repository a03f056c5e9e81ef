"""Root mean square layer normalization (arXiv 1910.07467), computed in float32 whatever the input's dtype."""

from torch import Tensor

from pomona.kernels.dispatch import backend_for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: ``weight * (x / sqrt(mean(x ** 2) + eps))`` over the last dimension.

    Args:
        x: [..., features], any strides; not changed.
        weight: [features], x's dtype.
        eps: added to the mean square.

    Returns:
        Like x, contiguous. The normalized value is rounded to x's dtype before the weight is applied.
    """
    result: Tensor = backend_for("norm", x.device).rms_norm(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Semantics: ``new_residual = x + residual``, ``normed = rms_norm(new_residual)``.

    Args:
        x: [num_tokens, features], a block's output.
        residual: like x. A backend may overwrite x and residual: the caller must not use them again.
        weight: [features], x's dtype.
        eps: added to the mean square.

    Returns:
        (normed, new_residual), both like x.
    """
    result: tuple[Tensor, Tensor] = backend_for("norm", x.device).add_rms_norm(x, residual, weight, eps)
    return result

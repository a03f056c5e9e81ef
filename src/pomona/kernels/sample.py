"""Greedy choice of the next token, and whether the logits can be trusted at all."""

from torch import Tensor

from pomona.kernels.dispatch import backend_for


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Semantics: ``argmax(logits)`` and ``all(isfinite(logits))`` of every row, in one pass.

    Args:
        logits: float32 [num_rows, vocab_size]; not changed.

    Returns:
        (token ids, int64 [num_rows]; is finite, bool [num_rows]). Where a row is not finite its token means nothing;
        of equal logits the first wins.
    """
    result: tuple[Tensor, Tensor] = backend_for("sample", logits.device).greedy(logits)
    return result

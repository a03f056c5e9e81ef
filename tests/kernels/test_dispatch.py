"""Choosing a backend."""

import pytest
import torch

from pomona.kernels import dispatch
from pomona.kernels.dispatch import OPS, backend_for, backends_of, use_backend


@pytest.mark.parametrize("op", OPS)
def test_the_reference_has_every_op_on_every_device(op: str) -> None:
    assert "reference" in backends_of(op)
    for device in ("cpu", "cuda", "meta"):
        with use_backend("reference"):
            assert backend_for(op, torch.device(device)).__name__ == f"pomona.kernels.reference.{op}"


def test_an_override_lasts_as_long_as_its_context_and_falls_through_for_ops_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # json stands for a backend module that has one op only.
    monkeypatch.setitem(dispatch._MODULES, "partial", {"norm": "json"})
    usual = backend_for("norm", torch.device("cpu"))
    usual_rope = backend_for("rope", torch.device("cpu"))
    with use_backend("partial"):
        assert backend_for("norm", torch.device("cpu")).__name__ == "json"
        assert backend_for("rope", torch.device("cpu")) is usual_rope
        with use_backend("reference"):
            assert backend_for("norm", torch.device("cpu")).__name__ == "pomona.kernels.reference.norm"
        assert backend_for("norm", torch.device("cpu")).__name__ == "json"
    assert backend_for("norm", torch.device("cpu")) is usual


def test_unknown_names_are_our_own_mistakes() -> None:
    with pytest.raises(AssertionError, match="no op named softmax"):
        backend_for("softmax", torch.device("cpu"))
    with pytest.raises(AssertionError, match="no backend named abacus"), use_backend("abacus"):
        pass

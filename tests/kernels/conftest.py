"""Whatever a kernel's wrapper allocates starts as NaN, so that an element that is not written shows."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with it, torch.empty fills with NaN, or the largest integer
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)

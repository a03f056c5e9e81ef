"""Triton among the backends of a test: an even sample of each grid under the interpreter, everything on a GPU.

Interpreted kernels take a thousand times as long. What is left out by default runs with ``-m slow``.
"""

import math
from collections.abc import Iterator

import pytest
import torch

_LARGEST_WHOLE_GRID = 8
_SAMPLE_SIZE = 8
_SAMPLE_SIZE_OF_MODELS = 2


def _uses_triton(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and "triton" in callspec.params.values()


def _stride(num_cases: int, sample_size: int) -> int:
    """A prime that is no parameter's number of values, so that the sample goes through all of them."""
    if num_cases <= _LARGEST_WHOLE_GRID:
        return 1
    stride = max(5 if num_cases <= 2 * _LARGEST_WHOLE_GRID else 7, num_cases // sample_size)
    while any(stride % factor == 0 for factor in range(2, math.isqrt(stride) + 1)):
        stride += 1
    return stride


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is not in the sample."""
    if torch.cuda.is_available():
        return
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if _uses_triton(item):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, cases in grids.items():
        stride = _stride(len(cases), _SAMPLE_SIZE if "/kernels/" in test else _SAMPLE_SIZE_OF_MODELS)
        for index, item in enumerate(cases):
            if index % stride != 0:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _tensors_where_the_kernels_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled Triton kernels need their tensors on the GPU; every other backend is tested on the CPU."""
    is_triton = _uses_triton(request.node) or request.node.path.name.startswith("test_triton_")
    if is_triton and torch.cuda.is_available():
        with torch.device("cuda"):
            yield
    else:
        yield

"""Memory that results share from step to step: nothing in use is given to anybody else."""

import gc
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.cpu.workspace import Activations, Workspace
from pomona.kernels.linear import pack, packed_linear

_LARGE = (512, 1024)
"""In float32: 2 MiB."""


@pytest.fixture(autouse=True)
def _collections_leave_out_what_other_tests_left() -> Iterator[None]:
    """Or each would go through all that was ever imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_results_in_use_never_overlap_and_gaps_are_used_again():
    workspace = Workspace()
    kept = [workspace.empty((3, 5), torch.float32) for _ in range(4)]
    for index, tensor in enumerate(kept):
        tensor.fill_(index)
    addresses = [tensor.data_ptr() for tensor in kept]
    view = kept[1][1:]
    del kept[1], tensor
    gc.collect()
    other = workspace.empty((3, 5), torch.float32)
    assert other.data_ptr() not in addresses, "a view keeps its storage"
    del view
    gc.collect()
    assert workspace.empty((2, 5), torch.float32).data_ptr() == addresses[1]
    assert [float(tensor[0, 0]) for tensor in kept] == [0.0, 2.0, 3.0]


def _fill(value: float) -> Tensor:
    return binding.empty(_LARGE, torch.float32).fill_(value)


def test_what_a_step_gave_back_the_next_one_takes():
    activations = Activations()
    with activations.in_use():
        first = _fill(1)
    assert float(first.sum()) == first.numel(), "there was no room, but there is memory"
    del first
    addresses = []
    for _ in range(3):
        with activations.in_use():
            results = [_fill(1), _fill(2)]
            addresses.append([result.data_ptr() for result in results])
            del results
    assert addresses[1] == addresses[2]


def test_a_result_outlives_later_steps_and_a_larger_region():
    activations = Activations()
    kept = []
    for step in range(6):  # each needs room for one more
        with activations.in_use():
            kept.append(_fill(step))
            for _ in range(step):
                _fill(-1)
    gc.collect()
    assert [(float(result.min()), float(result.max())) for result in kept] == [(step, step) for step in range(6)]
    addresses = sorted(result.data_ptr() for result in kept)
    assert all(after - before >= kept[0].nbytes for before, after in itertools.pairwise(addresses))


def test_only_large_results_of_the_thread_in_use_lie_there():
    activations = Activations()
    for _ in range(2):
        with activations.in_use():
            region = activations._workspace.region
            within = range(region.data_ptr(), region.data_ptr() + region.numel())
            large, small = _fill(0), binding.empty((4, 4), torch.float32)
            is_large_within, is_small_within = large.data_ptr() in within, small.data_ptr() in within
            del large
    assert is_large_within
    assert not is_small_within
    assert binding.empty(_LARGE, torch.float32).data_ptr() not in within


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
def test_kernels_results_are_the_same_there():
    x, weight = torch.randn(600, 40), pack(torch.randn(1000, 40))
    usual = packed_linear(x, weight)
    activations = Activations()
    for _ in range(3):
        with activations.in_use():
            torch.testing.assert_close(packed_linear(x, weight), usual, rtol=0, atol=0)
    assert activations._workspace.region.numel() >= usual.nbytes, "the last one lay there"


@pytest.mark.parametrize("num_containers", range(1, 12))
def test_a_result_that_garbage_collection_frees_in_the_middle_of_lending_leaves_the_others_apart(num_containers):
    workspace = Workspace()
    first, second, gap, last = (workspace.empty((size,), torch.uint8) for size in (64, 64, 2**17, 64))
    del gap
    threshold = gc.get_threshold()
    gc.collect()
    cycle = [first]
    cycle.append(cycle)
    gc.set_threshold(num_containers)  # after so many new ones the cycle is found, with one of them while lending
    try:
        del first, cycle
        lent = workspace.empty((2**16,), torch.uint8)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    further = workspace.empty((2**17,), torch.uint8)
    spans = sorted((part.data_ptr(), part.data_ptr() + part.numel()) for part in (second, last, lent, further))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))

"""Host memory that goes back to the system."""

import gc
import os
from pathlib import Path

import torch

from pomona.kernels.host_memory import mapped_zeros

PAGE = os.sysconf("SC_PAGE_SIZE")


def test_it_is_zeros_of_the_shape_that_can_be_written():
    tensor = mapped_zeros((3, 5), torch.bfloat16)
    assert tensor.shape == (3, 5)
    assert not tensor.any()
    tensor[1] = 2.0
    assert tensor.sum() == 10.0


def test_of_nothing_it_is_nothing():
    assert mapped_zeros((0, 5), torch.float32).shape == (0, 5)


def test_the_mapping_lives_as_long_as_a_view_of_it():
    gc.collect()
    before = Path("/proc/self/statm").read_text().split()[0]
    num_bytes = 256 * 2**20
    view = mapped_zeros((num_bytes,), torch.uint8)[5:]
    during = Path("/proc/self/statm").read_text().split()[0]
    assert (int(during) - int(before)) * PAGE >= num_bytes
    view[0] = 7
    assert view[0] == 7
    del view
    gc.collect()
    after = Path("/proc/self/statm").read_text().split()[0]
    assert (int(during) - int(after)) * PAGE >= num_bytes

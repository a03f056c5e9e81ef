"""Host memory: what is asked of the system, and what it then does."""

import gc
import os
from pathlib import Path

import pytest
import torch

from pomona.kernels.host_memory import mapped_zeros, prefer_huge_pages, take_memory

PAGE = os.sysconf("SC_PAGE_SIZE")
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")


def mapping_of(address):
    """The lines that /proc/self/smaps has of the mapping around an address, by name; None if nothing is there."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name.endswith(":"):
            if found is not None:
                found[name[:-1]] = rest.strip()
        else:
            if found is not None:
                return found
            start, end = (int(word, 16) for word in name.split("-"))
            found = {"permissions": rest.split()[0]} if start <= address < end else None
    return found


def test_it_is_zeros_of_the_shape_that_can_be_written():
    tensor = mapped_zeros((3, 5), torch.bfloat16)
    assert tensor.shape == (3, 5)
    assert not tensor.any()
    tensor[1] = 2.0
    assert tensor.sum() == 10.0


def test_of_nothing_it_is_nothing():
    assert mapped_zeros((0, 5), torch.float32).shape == (0, 5)


def test_small_blocks_too_go_back_to_the_system_with_the_last_view_of_them():
    tensors = [mapped_zeros((PAGE,), torch.uint8) for _ in range(20)]
    view = tensors[10][5:]
    address = tensors[10].data_ptr()
    assert address % PAGE == 0
    del tensors
    gc.collect()
    assert mapping_of(address)["permissions"] == "rw-p", "private, and still there"
    view[0] = 7
    assert view[0] == 7
    del view
    gc.collect()
    assert mapping_of(address) is None


def test_memory_is_taken_when_asked_for():
    tensor = mapped_zeros((4 * 2**20,), torch.uint8)
    tensor[:PAGE] = 3
    if not take_memory(tensor):
        pytest.skip("this system gives memory only when it is written")
    assert int(mapping_of(tensor.data_ptr())["Rss"].split()[0]) * 1024 >= tensor.numel()
    assert tensor.sum(dtype=torch.int64) == 3 * PAGE


def test_huge_pages_are_asked_for_where_there_are_any():
    tensor = mapped_zeros((8 * 2**20,), torch.uint8)
    prefer_huge_pages(tensor)
    middle = mapping_of(tensor.data_ptr() + tensor.numel() // 2)
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has none")
    assert "hg" in middle["VmFlags"].split()

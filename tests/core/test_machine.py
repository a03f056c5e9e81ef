"""How much of the machine is this process's to use, where a container has limits of its own."""

import os

import pytest

from pomona.core import machine

MIB = 2**20


@pytest.fixture
def container(tmp_path, monkeypatch):
    """The folder where a container's limits are; call it with a file's name and what that says."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)

    def say(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    return say


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("limit", "num_cores"), [("max", 8), ("200000", 2), ("150000", 2), ("1000", 1), ("1600000", 8)]
)
def test_no_more_cores_are_usable_than_the_container_is_granted_time_of(container, eight_cores, limit, num_cores):
    assert machine.num_usable_cores() == 8
    container("cpu.max", f"{limit} 100000\n")
    assert machine.num_usable_cores() == num_cores


@pytest.mark.parametrize(("limit", "num_cores"), [("-1", 8), ("200000", 2), ("150000", 2), ("1000", 1)])
def test_cores_in_a_container_of_cgroup_version_1(container, eight_cores, limit, num_cores):
    container("cpu/cpu.cfs_quota_us", f"{limit}\n")
    container("cpu/cpu.cfs_period_us", "100000\n")
    assert machine.num_usable_cores() == num_cores


def test_in_a_container_memory_that_holds_files_which_were_read_is_free(container):
    container("memory.max", f"{100 * MIB}\n")
    container("memory.current", f"{98 * MIB}\n")
    container(
        "memory.stat",
        f"anon {40 * MIB}\nfile {58 * MIB}\nshmem {3 * MIB}\ninactive_file {50 * MIB}\nactive_file {5 * MIB}\n",
    )
    assert machine.available_host_bytes() == 57 * MIB
    assert machine.host_bytes() == 100 * MIB
    container("memory.max", "max\n")
    assert machine.available_host_bytes() > 57 * MIB
    assert machine.host_bytes() > 100 * MIB


def test_memory_in_a_container_of_cgroup_version_1(container):
    container("memory/memory.limit_in_bytes", f"{100 * MIB}\n")
    container("memory/memory.usage_in_bytes", f"{98 * MIB}\n")
    container(
        "memory/memory.stat",
        f"cache {58 * MIB}\ninactive_file 1\nactive_file 1\ntotal_inactive_file {50 * MIB}\n"
        f"total_active_file {5 * MIB}\n",
    )
    assert machine.available_host_bytes() == 57 * MIB
    assert machine.host_bytes() == 100 * MIB
    container("memory/memory.limit_in_bytes", "9223372036854771712\n")  # the word for no limit
    assert machine.available_host_bytes() > 57 * MIB
    assert machine.host_bytes() > 100 * MIB

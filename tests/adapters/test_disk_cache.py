"""Adapters on this machine's disk: budget, restarts, full disks, rot."""

import resource
from pathlib import Path

import pytest

from pomona.adapters.disk_cache import DiskCache
from pomona.core.errors import AdapterError, AdapterUnavailableError, ConfigError
from pomona.core.ids import AdapterId


def put(cache: DiskCache, name: str, num_bytes: int = 100) -> Path:
    def write(folder: Path) -> AdapterId:
        (folder / "adapter_model.safetensors").write_bytes(bytes(num_bytes))
        return AdapterId(name)

    adapter_id, path = cache.put(f"s3://store/{name}", "v1", num_bytes, write)
    cache.release(adapter_id)
    return path


def test_what_is_kept_is_found_again_after_a_restart(tmp_path: Path):
    cache = DiskCache(tmp_path, 1000)
    path = put(cache, "a")
    cache.close()
    (tmp_path / "partial" / "left-over").mkdir()
    again = DiskCache(tmp_path, 1000)
    known = again.source("s3://store/a")
    assert known is not None
    assert (known.tag, known.adapter_id) == ("v1", "a")
    assert again.take(known.adapter_id) == path
    assert again.num_bytes == 100
    assert not list((tmp_path / "partial").iterdir())


def test_the_least_recently_used_goes_but_nothing_in_use(tmp_path: Path):
    cache = DiskCache(tmp_path, 250)
    for name in ("a", "b"):
        put(cache, name)
    assert cache.take(AdapterId("a")) is not None
    put(cache, "c")
    assert cache.ids == ("a", "c")
    put(cache, "d")
    assert cache.ids == ("a", "d")
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"a", "d"}


def test_what_is_larger_than_the_budget_is_refused_and_evicts_nothing(tmp_path: Path):
    cache = DiskCache(tmp_path, 250)
    put(cache, "a")
    with pytest.raises(AdapterError, match="has 251 bytes, but adapter_cache_bytes is 250"):
        put(cache, "large", 251)
    assert cache.ids == ("a",)
    put(cache, "largest", 250)


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path: Path):
    cache = DiskCache(tmp_path, 10**9)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(AdapterUnavailableError, match="File too large"):
            put(cache, "large", 10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "partial").iterdir())
    assert cache.take(AdapterId("large")) is None
    put(cache, "large", 10**6)


def test_two_servers_do_not_share_a_folder(tmp_path: Path):
    cache = DiskCache(tmp_path, 1000)
    with pytest.raises(ConfigError, match="another server"):
        DiskCache(tmp_path, 1000)
    cache.close()
    DiskCache(tmp_path, 1000).close()


def test_what_has_rotted_is_dropped(tmp_path: Path):
    cache = DiskCache(tmp_path, 1000)
    path = put(cache, "a")
    cache.drop(AdapterId("a"))
    assert not path.exists()
    assert cache.num_bytes == 0


def test_what_was_fetched_anew_is_not_dropped_for_what_was_there_before(tmp_path: Path):
    cache, a = DiskCache(tmp_path, 1000), AdapterId("a")
    path = put(cache, "a")
    for _ in range(2):
        cache.take(a)
    cache.drop(a)
    cache.release(a)
    put(cache, "a")
    cache.drop(a)  # by the other, who had the same rotten files
    cache.release(a)
    assert path.exists()
    cache.take(a)
    cache.drop(a)
    assert not path.exists()
    cache.release(a)

"""Adapters in object stores: an S3 server of moto's, and a memory file system that can be made to fail."""

import json
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from pomona.adapters.digest import adapter_digest
from pomona.adapters.disk_cache import DiskCache
from pomona.adapters.remote import RemoteFolders
from pomona.adapters.sources import AdapterSources, read_files
from pomona.adapters.stores import RemoteStore
from pomona.core.errors import (
    AdapterError,
    AdapterForbiddenError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ConfigError,
)

WEIGHTS = bytes(range(256)) * 10


class FaultyFileSystem(MemoryFileSystem):
    """A store that loses its connection, gives up in the middle, or cuts files short."""

    protocol = "faulty"
    store: dict = {}
    pseudo_dirs = [""]
    fault: str | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://"))

    def info(self, path, **kwargs):
        if self.fault == "gone":
            raise ConnectionError("no route to the store")
        return super().info(path, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        file = super()._open(path, mode, **kwargs)
        if mode == "rb" and path.endswith("safetensors") and self.fault in ("vanishes", "truncates"):
            return _CutFile(file, is_error=self.fault == "vanishes")
        return file


class _CutFile:
    def __init__(self, file, is_error: bool) -> None:
        self._file, self._is_error, self._num_reads = file, is_error, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self, num_bytes: int) -> bytes:
        self._num_reads += 1
        if self._num_reads == 1:
            return self._file.read(100)
        if self._is_error:
            raise ConnectionResetError("the store vanished")
        return b""


@pytest.fixture
def faulty():
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.fault = None
    FaultyFileSystem.store = {}
    FaultyFileSystem.pseudo_dirs = [""]
    system = FaultyFileSystem(skip_instance_cache=True)
    for name in ("a", "b"):
        system.pipe_file(f"faulty://bucket/{name}/adapter_config.json", json.dumps({"r": 4, "name": name}).encode())
        system.pipe_file(f"faulty://bucket/{name}/adapter_model.safetensors", WEIGHTS + name.encode())
    return system


@pytest.fixture
def cache(tmp_path: Path):
    cache = DiskCache(tmp_path / "cache", 10**6)
    yield cache
    cache.close()


@pytest.fixture
def sources(cache: DiskCache):
    return AdapterSources(("faulty://bucket",), remote=RemoteFolders(cache))


def test_what_is_fetched_is_what_is_there_and_is_fetched_once(faulty, sources: AdapterSources):
    first = sources.fetch("faulty://bucket/a")
    files = read_files(first.path)
    assert files.weights_bytes == WEIGHTS + b"a"
    assert adapter_digest(files) == first.cached_id
    assert first.num_weights_bytes == len(WEIGHTS) + 1
    again = sources.fetch("faulty://bucket/a")
    assert again == first
    for adapter in (first, again):
        sources.release(adapter)


@pytest.mark.parametrize(
    ("fault", "text"), [("gone", "no route"), ("vanishes", "vanished"), ("truncates", "changed while")]
)
def test_a_store_that_fails_is_unavailable_until_it_is_back(faulty, sources, cache, tmp_path, fault, text):
    FaultyFileSystem.fault = fault
    with pytest.raises(AdapterUnavailableError, match=text):
        sources.fetch("faulty://bucket/a")
    assert cache.ids == ()
    assert not list((tmp_path / "cache" / "partial").iterdir())
    FaultyFileSystem.fault = None
    sources.release(sources.fetch("faulty://bucket/a"))


def test_what_was_fetched_is_used_while_the_store_is_away(faulty, sources: AdapterSources):
    first = sources.fetch("faulty://bucket/a")
    sources.release(first)
    FaultyFileSystem.fault = "gone"
    again = sources.fetch("faulty://bucket/a")
    assert again.cached_id == first.cached_id
    sources.release(again)


@pytest.mark.parametrize("other", [b"other" * 100, WEIGHTS + b"c"])
def test_other_bytes_under_the_same_url_are_fetched(faulty, sources: AdapterSources, other: bytes):
    first = sources.fetch("faulty://bucket/a")
    sources.release(first)
    faulty.pipe_file("faulty://bucket/a/adapter_model.safetensors", other)
    again = sources.fetch("faulty://bucket/a")
    assert again.cached_id != first.cached_id
    assert read_files(again.path).weights_bytes == other
    sources.release(again)


def test_what_rotted_on_disk_is_fetched_anew(faulty, sources: AdapterSources):
    first = sources.fetch("faulty://bucket/a")
    weights = Path(first.path, "adapter_model.safetensors")
    weights.write_bytes(b"\1" + weights.read_bytes()[1:])
    assert adapter_digest(read_files(first.path)) != first.cached_id
    sources.release(first, is_corrupt=True)
    again = sources.fetch("faulty://bucket/a")
    assert adapter_digest(read_files(again.path)) == again.cached_id == first.cached_id
    sources.release(again)


@pytest.mark.parametrize(
    "source",
    [
        *("faulty://bucket/../x", "faulty://other/a", "faulty://bucket", "s3://bucket/a"),
        # Web servers, and what speaks to them, take these for the first.
        *("faulty://bucket/%2e%2E/x", "faulty://bucket/.%2e/x", "faulty://bucket/a%2f..%2F..%2fx"),
        *("faulty://bucket/%252e%252e/x", "faulty://bucket/.\t./x", "faulty://bucket/.\n./x", "faulty://bucket/..\\x"),
    ],
)
def test_urls_outside_are_forbidden(faulty, sources: AdapterSources, source):
    with pytest.raises(AdapterForbiddenError):
        sources.fetch(source)


def test_nothing_at_a_url_is_not_found(faulty, sources: AdapterSources):
    with pytest.raises(AdapterNotFoundError):
        sources.fetch("faulty://bucket/nothing")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_lacks_a_file_is_one_that_cannot_be_used(faulty, sources: AdapterSources, name: str):
    faulty.rm_file(f"faulty://bucket/a/{name}")
    missing = r"no adapter_config\.json at" if name == "adapter_config.json" else "no weights at"
    with pytest.raises(AdapterError, match=f"{missing} faulty://bucket/a") as refusal:
        sources.fetch("faulty://bucket/a")
    assert not isinstance(refusal.value, AdapterNotFoundError)


def test_a_store_is_listed_or_says_itself_what_it_has(faulty, cache):
    store = RemoteStore("faulty://bucket", RemoteFolders(cache))
    assert [(adapter.name, adapter.source) for adapter in store.list()] == [
        ("a", "faulty://bucket/a"),
        ("b", "faulty://bucket/b"),
    ]
    lines = [{"name": "legal", "path": "a", "digest": "0" * 64}, {"name": "b"}]
    faulty.pipe_file("faulty://bucket/index.json", json.dumps({"adapters": lines}).encode())
    store = RemoteStore("faulty://bucket", RemoteFolders(cache))
    legal = store.find("legal")
    assert legal is not None
    assert (legal.source, legal.adapter_id) == ("faulty://bucket/a", "0" * 64)
    assert store.find("a") is None


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ([{"name": "a"}, {"name": "a"}], "twice"),
        ([{"path": "a"}], "must have a name"),
        ([{"name": "a", "digest": "12"}], "64 hex"),
        (5, "must be JSON|a list"),
    ],
)
def test_a_malformed_index_says_where(faulty, cache, index, text):
    faulty.pipe_file("faulty://bucket/index.json", json.dumps({"adapters": index}).encode())
    with pytest.raises(ConfigError, match=text):
        RemoteStore("faulty://bucket", RemoteFolders(cache)).list()


def test_an_s3_server_gives_its_adapters_and_what_it_gave_survives_its_end(tmp_path: Path, monkeypatch):
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    cache = DiskCache(tmp_path, 10**6)
    remote = RemoteFolders(cache)
    system = remote.system("s3://adapters")
    system.mkdir("s3://adapters")
    for name in ("a", "b"):
        system.pipe_file(f"s3://adapters/team/{name}/adapter_config.json", b"{}")
        system.pipe_file(f"s3://adapters/team/{name}/adapter_model.safetensors", WEIGHTS + name.encode())
    sources = AdapterSources(("s3://adapters/team",), remote=remote)
    try:
        assert [adapter.name for adapter in RemoteStore("s3://adapters/team", remote).list()] == ["a", "b"]
        adapter = sources.fetch("s3://adapters/team/a")
        assert read_files(adapter.path).weights_bytes == WEIGHTS + b"a"
        sources.release(adapter)
    finally:
        server.stop()
        cache.close()
    cache = DiskCache(tmp_path, 10**6)
    sources = AdapterSources(("s3://adapters/team",), remote=RemoteFolders(cache))
    again = sources.fetch("s3://adapters/team/a")
    assert again.cached_id == adapter.cached_id
    with pytest.raises(AdapterUnavailableError):
        sources.fetch("s3://adapters/team/b")
    cache.close()

"""Where adapters may come from, and reading folders that may be hostile."""

import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants as hub_constants

from pomona.adapters.sources import AdapterSources, read_files
from pomona.core.errors import AdapterError, AdapterForbiddenError, AdapterNotFoundError


def make_folder(path: Path, *, config: bytes | None = b"{}", weights: bytes | None = b"w") -> Path:
    path.mkdir(parents=True)
    if config is not None:
        (path / "adapter_config.json").write_bytes(config)
    if weights is not None:
        (path / "adapter_model.safetensors").write_bytes(weights)
    return path


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "allowed" / "good").parent


def sources(roots: Path, *, allow_hub: bool = False) -> AdapterSources:
    return AdapterSources(allowed_roots=(str(roots),), allow_hub=allow_hub)


def test_a_folder_inside_an_allowed_root_is_found(roots: Path) -> None:
    assert sources(roots).resolve(str(roots / "good")) == str(roots / "good")


def test_a_relative_path_is_found_from_the_current_folder(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(roots.parent)
    assert sources(roots, allow_hub=True).resolve("allowed/good") == str(roots / "good")


def test_an_allowed_root_may_itself_be_a_link(roots: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(roots)
    assert sources(tmp_path / "alias").resolve(str(tmp_path / "alias" / "good")) == str(roots / "good")


@pytest.mark.parametrize("escape", ["../outside", "good/../../outside", "link", "link/.", "../allowed-too/x"])
def test_a_path_outside_the_roots_is_forbidden_whether_or_not_it_exists(
    escape: str, roots: Path, tmp_path: Path
) -> None:
    make_folder(tmp_path / "outside")
    make_folder(tmp_path / "allowed-too" / "x")
    (roots / "link").symlink_to(tmp_path / "outside")
    source = f"{roots}/{escape}"
    with pytest.raises(AdapterForbiddenError) as existing:
        sources(roots).resolve(source)
    absent = f"{tmp_path}/absent"
    with pytest.raises(AdapterForbiddenError) as missing:
        sources(roots).resolve(absent)
    assert str(existing.value).replace(source, "X") == str(missing.value).replace(absent, "X")


def test_a_missing_folder_inside_the_roots_is_not_found(roots: Path) -> None:
    with pytest.raises(AdapterNotFoundError):
        sources(roots).resolve(str(roots / "absent"))


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 5000])
def test_what_cannot_be_a_path_is_refused(source: str, roots: Path) -> None:
    with pytest.raises(AdapterError, match="source"):
        sources(roots).resolve(source)


def test_nothing_is_allowed_by_default(roots: Path) -> None:
    for source in (str(roots / "good"), "org/name"):
        with pytest.raises(AdapterForbiddenError):
            AdapterSources().resolve(source)


def test_a_hub_id_is_forbidden_unless_the_hub_is_allowed(roots: Path) -> None:
    with pytest.raises(AdapterForbiddenError):
        sources(roots).resolve("org/name")


@pytest.mark.parametrize("source", ["/srv/adapters/legal", "s3://bucket/legal"])
def test_a_refusal_names_the_settings_that_would_allow_it_and_no_folder(source: str, roots: Path) -> None:
    with pytest.raises(AdapterForbiddenError, match="--allowed-adapter-root") as refused:
        sources(roots).fetch(source)
    assert str(roots) not in str(refused.value)
    with pytest.raises(AdapterForbiddenError, match="--allow-hub-adapters"):
        sources(roots).fetch("org/name")
    with pytest.raises(AdapterForbiddenError) as refused:
        sources(roots, allow_hub=True).fetch("/srv/adapters/legal")
    assert "--allow-hub-adapters" not in str(refused.value)


@pytest.mark.parametrize("source", ["org/name", "org/name@main", "org/name@refs/pr/1"])
def test_a_hub_id_that_is_not_cached_says_what_to_do_when_offline(source: str, roots: Path) -> None:
    with pytest.raises(AdapterError, match=r"hub cannot be reached.*hf download org/name"):
        sources(roots, allow_hub=True).resolve(source)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one adapter, laid out as huggingface_hub does: links from snapshots to blobs."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--org--name"
    commit = "0" * 40
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, blob in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"weights")):
        (repo / "blobs" / name).write_bytes(blob)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return cache


def test_a_cached_hub_adapter_is_found_and_read_offline(roots: Path, hub_cache: Path) -> None:
    folder = huggingface_hub.snapshot_download("org/name", cache_dir=hub_cache)
    assert read_files(folder).weights_bytes == b"weights"


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_of_weights_in_two_formats_one_is_downloaded(
    has_safetensors: bool, roots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = {"adapter_config.json", "adapter_model.bin"} | (
        {"adapter_model.safetensors"} if has_safetensors else set()
    )
    folder = tmp_path / "snapshot"
    folder.mkdir()

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for name in repository.intersection(allow_patterns):
            (folder / name).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    sources(roots, allow_hub=True).fetch("org/name")
    wanted = "adapter_model.safetensors" if has_safetensors else "adapter_model.bin"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", wanted]


def test_a_link_from_the_hub_cache_to_elsewhere_is_forbidden(hub_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    folder = Path(huggingface_hub.snapshot_download("org/name", cache_dir=hub_cache))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterForbiddenError):
        read_files(str(folder))


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    files = read_files(str(make_folder(tmp_path / "a", config=b'{"r": 1}', weights=b"abc")))
    assert (files.config_bytes, files.weights_bytes, files.weights_format) == (b'{"r": 1}', b"abc", "safetensors")


def test_safetensors_is_preferred_to_bin(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(b"bin")
    assert read_files(str(folder)).weights_format == "safetensors"
    (folder / "adapter_model.safetensors").unlink()
    assert read_files(str(folder)).weights_format == "bin"


def test_a_folder_without_a_config_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json") as refused:
        read_files(str(make_folder(tmp_path / "a", config=None)))
    assert not isinstance(refused.value, AdapterNotFoundError), "the folder is there, and is listed"


def test_what_is_no_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"no adapter_config\.json"):
        read_files(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterNotFoundError, match=r"no adapter_config\.json"):
        read_files(str(tmp_path / "file"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no weights"):
        read_files(str(make_folder(tmp_path / "a", weights=None)))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_linked_from_outside_is_forbidden(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    (tmp_path / "secret").write_bytes(b"{}")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterForbiddenError, match=name):
        read_files(str(folder))


def test_a_link_that_stays_inside_the_folder_is_followed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "step-3.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("step-3.safetensors")
    assert read_files(str(folder)).weights_bytes == b"w"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_regular_file_is_refused_without_waiting(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", weights=None)
    path = folder / "adapter_model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        read_files(str(folder))


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", weights=None)
    (folder / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
    with pytest.raises(AdapterForbiddenError):
        read_files(str(folder))


def test_files_over_the_limit_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", weights=b"12345")
    assert read_files(str(folder), max_weights_bytes=5).weights_bytes == b"12345"
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors has 5 bytes; the limit is 4"):
        read_files(str(folder), max_weights_bytes=4)
    (folder / "adapter_config.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(AdapterError, match=r"adapter_config.json has 1048577 bytes"):
        read_files(str(folder))


def test_a_source_is_settled_to_the_folder_that_it_means(roots: Path, tmp_path: Path) -> None:
    (roots / "link").symlink_to(roots / "good")
    (roots / "out").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(roots)
    for root in (roots, tmp_path / "alias"):
        for name in ("good", "link", "./good", "good/../link"):
            assert sources(root).settled(f"{root}/{name}") == str(roots / "good")
    for other in (f"{roots}/absent", f"{roots}/out", "/", "org/name", "s3://store/x", "", "a\0b", "x" * 5000):
        assert sources(roots).settled(other) == other


def test_a_place_in_the_roots_is_known_by_its_spelling(roots: Path, tmp_path: Path) -> None:
    found = AdapterSources((str(roots), "s3://store"))
    for place in (f"{roots}/good", f"{roots}/absent", "s3://store/x"):
        assert found.has(place)
    for place in (f"{roots}/../allowed/good", f"{tmp_path}/good", "good", "s3://other/x"):
        assert not found.has(place)

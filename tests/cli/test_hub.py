"""What is downloaded of a base model, from a hub that is a folder."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from pomona.cli.hub import bundled_dir, checkpoint_dir, model_name
from pomona.core.errors import CheckpointError

COMMON = ("config.json", "tokenizer.json")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the repository; what is downloaded of it lies in a folder beside it."""
    repo = tmp_path / "repo"
    repo.mkdir()

    def snapshot_download(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        assert (repo_id, revision) == ("org/base", "v1")
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir(exist_ok=True)
        names = [str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (snapshot / name).parent.mkdir(exist_ok=True)
            shutil.copy(repo / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repo


@pytest.mark.parametrize(
    ("there", "downloaded"),
    [
        (("model.safetensors", "pytorch_model.bin"), ("model.safetensors",)),
        (("pytorch_model.bin", "training_args.bin"), ("pytorch_model.bin",)),
        (
            ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
            ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
        ),
        (
            ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
            ("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
        ),
        (("model.safetensors", "consolidated.safetensors"), ("model.safetensors",)),
        (("model.safetensors", "original/model.safetensors", "onnx/config.json"), ("model.safetensors",)),
    ],
)
def test_weights_are_downloaded_once(hub: Path, there: tuple[str, ...], downloaded: tuple[str, ...]) -> None:
    for name in (*COMMON, *there):
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_text("{}")
    folder = checkpoint_dir("org/base@v1")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert sorted(names) == sorted((*COMMON, *downloaded))


def test_a_revision_may_have_slashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*COMMON, "model.safetensors"):
        (tmp_path / name).write_text("{}")
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repo_id: str, *, revision: str | None, **_: object) -> str:
        asked.append((repo_id, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoint_dir("org/base@refs/pr/1") == tmp_path
    assert asked == [("org/base", "refs/pr/1")]
    assert model_name("org/base@refs/pr/1") == "base@refs/pr/1"
    assert model_name("org/base") == "base"


def test_a_folder_that_is_no_checkpoint_is_refused_with_what_to_pass_instead(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json: pass the folder of a Hugging Face checkpoint"):
        checkpoint_dir(str(tmp_path))
    adapter = bundled_dir() / "adapters" / "upper"
    with pytest.raises(CheckpointError, match=rf"is an adapter: pass its base model, and --adapter NAME={adapter}"):
        checkpoint_dir(str(adapter))

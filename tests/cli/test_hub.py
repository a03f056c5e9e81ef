"""What is downloaded of a base model, from a hub that is a folder."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from pomona.cli.hub import checkpoint_dir

COMMON = ("config.json", "tokenizer.json")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the repository; what is downloaded of it lies in a folder beside it."""
    repo = tmp_path / "repo"
    repo.mkdir()

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("org/base", "v1")
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir(exist_ok=True)
        for name in filter_repo_objects([path.name for path in repo.iterdir()], allow_patterns=allow_patterns):
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
    ],
)
def test_pickled_weights_are_downloaded_only_where_there_are_no_others(
    hub: Path, there: tuple[str, ...], downloaded: tuple[str, ...]
) -> None:
    for name in (*COMMON, *there):
        (hub / name).write_text("{}")
    folder = checkpoint_dir("org/base@v1")
    assert sorted(path.name for path in folder.iterdir()) == sorted((*COMMON, *downloaded))

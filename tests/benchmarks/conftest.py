"""A cache folder with the assets of the tiny shape: its model and a few adapters, made once per test session."""

from pathlib import Path

import pytest

from benchmarks import assets, workload
from benchmarks.shapes import TINY

ADAPTERS = [("r16-00", 16), ("r16-01", 16), ("r4-00", 4), ("r4-01", 4), ("r128-00", 128)]


@pytest.fixture(scope="session")
def tiny_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder."""
    root = tmp_path_factory.mktemp("bench-cache")
    model = root / TINY.name / "model"
    model.mkdir(parents=True)
    assets.write_model(TINY, model)
    for seed, (name, lora_rank) in enumerate(ADAPTERS):
        folder = root / TINY.name / "adapters" / name
        folder.mkdir(parents=True)
        assets.write_adapter(TINY, folder, lora_rank, seed)
    return root


@pytest.fixture
def tiny_cache(tiny_assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, in use."""
    monkeypatch.setenv(workload.CACHE_VARIABLE, str(tiny_assets))
    return tiny_assets

"""Which device is meant, and that steps work on it whichever thread they are called from."""

from types import SimpleNamespace

import pytest
import torch

from pomona.core.errors import ConfigError
from pomona.core.plan import StepPlan
from pomona.kernels.copies import Download
from pomona.runner.config import RunnerConfig
from pomona.runner.memory import torch_device
from pomona.runner.runner import LaunchedModelStep, ModelRunner
from support.models import make_checkpoint
from support.runner import TinyEngine


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("name", "device"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_gpu_has_its_number(two_gpus, name, device):
    assert torch_device(RunnerConfig(model_path="x", device=name)) == torch.device(device)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:x", "meta", "tpu"])
def test_devices_that_are_not_there_are_refused(two_gpus, name):
    with pytest.raises(ConfigError, match=f"device is '{name}'"):
        torch_device(RunnerConfig(model_path="x", device=name))


def test_a_step_works_on_its_own_gpu_whichever_thread_calls(tmp_path, monkeypatch):
    """Kernels and events go to the thread's current GPU, which is the first one until it is told otherwise."""
    loaded = TinyEngine(make_checkpoint(tmp_path / "base")).loaded
    plain = loaded.runner
    device = torch.device("cuda:1")
    runner = ModelRunner(
        plain._decoder,
        plain._kv_cache,
        plain._adapter_pool,
        loaded.adapters,
        plain._table,
        block_size=4,
        device=device,
    )
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    runner.launch(StepPlan(step_id=0, seqs=()))
    assert chosen == [device]


def test_a_step_on_a_gpu_that_samples_nothing_is_waited_for_all_the_same(tmp_path):
    runner = TinyEngine(make_checkpoint(tmp_path / "base")).loaded.runner
    waited: list[None] = []
    computed = Download((torch.empty(0),), SimpleNamespace(synchronize=lambda: waited.append(None)))
    LaunchedModelStep(0, runner._table, runner._adapter_pool, computed=computed).result()
    assert waited

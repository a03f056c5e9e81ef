"""load_runner: a checkpoint folder becomes a ModelRunner whose sizes are known."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pomona.core.errors import ConfigError
from pomona.model.adapter_weights import AdapterLoader
from pomona.model.decoder import Decoder
from pomona.model.hf_config import read_spec
from pomona.model.lora import PageLayout
from pomona.model.spec import ModelSpec
from pomona.model.weights import DecoderWeights, Quantization, load_weights
from pomona.runner.adapter_host import StagedAdapters
from pomona.runner.adapter_pool import AdapterPool
from pomona.runner.config import RunnerConfig
from pomona.runner.kv_cache import KVCache
from pomona.runner.memory import Capacity, plan_capacity, torch_device, torch_dtype
from pomona.runner.runner import ModelRunner
from pomona.runner.sequences import SequenceTable


@dataclass(frozen=True)
class LoadedRunner:
    """A runner with what was found while loading it."""

    runner: ModelRunner
    adapters: StagedAdapters
    spec: ModelSpec
    capacity: Capacity
    max_model_len: int
    dtype: torch.dtype
    device: torch.device

    @property
    def device_name(self) -> str:
        """For people: "cpu (2 threads)", "cuda:0 (NVIDIA H200)"."""
        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        return f"cpu ({torch.get_num_threads()} threads)"


def load_runner(config: RunnerConfig, report_progress: Callable[[str], None] = lambda text: None) -> LoadedRunner:
    """Load the base model and set aside memory for KV blocks and adapters.

    Raises:
        CheckpointError: the checkpoint is unreadable or of an unsupported kind.
        ConfigError: a setting does not fit the model or the machine.
    """
    weights = _load_weights(config, report_progress)
    spec, device, dtype = weights.spec, weights.device, weights.dtype
    max_model_len = config.max_model_len or spec.max_position_embeddings
    if max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {max_model_len} but the model was made for {spec.max_position_embeddings} positions"
        )
    report_progress("allocating the KV cache")
    layout = PageLayout(spec, config.rows_per_page)
    capacity = plan_capacity(config, spec, layout, max_model_len=max_model_len, device=device)
    adapters = StagedAdapters(AdapterLoader(weights, layout, capacity.num_adapter_pages), capacity.num_adapter_pages)
    runner = ModelRunner(
        Decoder(spec, weights, max_model_len),
        KVCache(spec, capacity.num_kv_blocks, config.block_size, dtype=dtype, device=device),
        AdapterPool(layout, capacity.num_adapter_pages, dtype=dtype, device=device),
        adapters,
        SequenceTable(config.max_num_seqs, max_model_len, config.block_size),
        block_size=config.block_size,
        device=device,
    )
    return LoadedRunner(runner, adapters, spec, capacity, max_model_len, dtype, device)


def load_adapter_host(config: RunnerConfig) -> StagedAdapters:
    """Only what it takes to read, verify and convert adapters for a base model; nothing can be run.

    Raises:
        CheckpointError: the checkpoint is unreadable or of an unsupported kind.
    """
    weights = _load_weights(config, lambda text: None)
    return StagedAdapters(AdapterLoader(weights, PageLayout(weights.spec, config.rows_per_page)), sys.maxsize)


def _load_weights(config: RunnerConfig, report_progress: Callable[[str], None]) -> DecoderWeights:
    folder = Path(config.model_path)
    spec = read_spec(folder)
    device = torch_device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    return load_weights(
        folder,
        spec,
        torch_dtype(config, spec, device),
        device,
        lambda done, total: report_progress(f"loading weights {100 * done // total}%"),
        Quantization(config.quantization),
    )

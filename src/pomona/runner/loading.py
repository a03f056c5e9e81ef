"""load_runner: a checkpoint folder becomes a ModelRunner whose sizes are known."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pomona.core.errors import ConfigError
from pomona.core.machine import num_usable_cores
from pomona.kernels.cpu import binding
from pomona.model.adapter_weights import AdapterLoader
from pomona.model.decoder import Decoder
from pomona.model.hf_config import read_spec
from pomona.model.lora import PageLayout
from pomona.model.spec import ModelSpec
from pomona.model.weights import DecoderWeights, Quantization, load_weights
from pomona.runner.adapter_host import StagedAdapters
from pomona.runner.adapter_pool import AdapterPool
from pomona.runner.captures import Capture, CudaCapture, Recall
from pomona.runner.config import RunnerConfig
from pomona.runner.graph_inputs import GraphLimits
from pomona.runner.graphs import DecodeGraphs, default_batch_sizes, measure_graph_bytes
from pomona.runner.kv_cache import KVCache, block_bytes, lazy_zeros
from pomona.runner.memory import Capacity, plan_capacity, torch_device, torch_dtype
from pomona.runner.runner import ModelRunner
from pomona.runner.sequences import SequenceTable

_LOGGER = logging.getLogger(__name__)


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
    spec = read_spec(Path(config.model_path))
    max_model_len = config.max_model_len or spec.max_position_embeddings
    if max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {max_model_len} but the model was made for {spec.max_position_embeddings} positions"
        )
    weights = _load_weights(config, spec, report_progress)
    device, dtype = weights.device, weights.dtype
    report_progress("allocating the KV cache")
    layout = PageLayout(spec, config.rows_per_page)
    decoder = Decoder(spec, weights, max_model_len)
    capacity = plan_capacity(config, spec, layout, max_model_len=max_model_len, device=device)
    limits = _graph_limits(config, capacity, max_model_len, device)
    if limits is not None:
        reserved = limits.num_scrap_blocks * block_bytes(spec, config.block_size, dtype)
        reserved += _measured_graph_bytes(decoder, layout, limits, dtype)
        capacity = plan_capacity(
            config, spec, layout, max_model_len=max_model_len, device=device, reserved_bytes=reserved
        )
        limits = replace(limits, num_kv_blocks=capacity.num_blocks_in_all)
    adapters = StagedAdapters(AdapterLoader(weights, layout, capacity.num_adapter_pages), capacity.num_adapter_pages)
    # KV's own blocks, then those of adapter pages, then scrap.
    num_blocks = capacity.num_blocks_in_all + (limits.num_scrap_blocks if limits is not None else 0)
    kv_cache = KVCache(spec, num_blocks, config.block_size, dtype=dtype, device=device)
    kv_cache.use(0)
    if capacity.blocks_per_page:
        pages = kv_cache.pages(
            capacity.num_kv_blocks, capacity.num_adapter_pages, capacity.blocks_per_page, layout.page_elems
        )
    else:
        pages = lazy_zeros((capacity.num_adapter_pages, layout.page_elems), dtype=dtype, device=device)
    pool = AdapterPool(layout, pages, link_bytes_per_s=config.adapter_link_bytes_per_s)
    graphs = None
    if limits is not None:
        graphs = DecodeGraphs(decoder, kv_cache, pool, limits, _capture(device))
        graphs.capture_all(report_progress)
    runner = ModelRunner(
        decoder,
        kv_cache,
        pool,
        adapters,
        SequenceTable(config.max_num_seqs, max_model_len, config.block_size),
        block_size=config.block_size,
        device=device,
        graphs=graphs,
    )
    return LoadedRunner(runner, adapters, spec, capacity, max_model_len, dtype, device)


def _graph_limits(
    config: RunnerConfig, capacity: Capacity, max_model_len: int, device: torch.device
) -> GraphLimits | None:
    """What captured steps have room for; None if none are."""
    is_on = device.type == "cuda" if config.decode_graphs is None else config.decode_graphs
    if not is_on:
        return None
    return GraphLimits(
        batch_sizes=config.graph_batch_sizes or default_batch_sizes(config.max_num_seqs),
        max_lora_rank=config.graph_max_lora_rank,
        num_kv_blocks=capacity.num_blocks_in_all,
        block_size=config.block_size,
        max_model_len=max_model_len,
    )


def _capture(device: torch.device) -> Capture:
    return CudaCapture(device) if device.type == "cuda" else Recall()


def _measured_graph_bytes(decoder: Decoder, layout: PageLayout, limits: GraphLimits, dtype: torch.dtype) -> int:
    """Device memory that capturing will take; 0 where nothing is captured."""
    device = decoder.weights.device
    if device.type != "cuda":
        return 0

    def make_graphs() -> DecodeGraphs:
        num_blocks = -(-limits.batch_sizes[-1] // limits.block_size)
        kv_cache = KVCache(layout.spec, num_blocks, limits.block_size, dtype=dtype, device=device)
        pool = AdapterPool(layout, torch.zeros((1, layout.page_elems), dtype=dtype, device=device))
        return DecodeGraphs(decoder, kv_cache, pool, limits, CudaCapture(device))

    def free_bytes() -> int:
        torch.cuda.synchronize(device)
        return torch.cuda.mem_get_info(device)[0]

    num_bytes = measure_graph_bytes(make_graphs, limits.batch_sizes, free_bytes)
    torch.cuda.empty_cache()
    return num_bytes


def load_adapter_host(config: RunnerConfig) -> StagedAdapters:
    """Only what it takes to read, verify and convert adapters for a base model; nothing can be run.

    Raises:
        CheckpointError: the checkpoint is unreadable or of an unsupported kind.
    """
    weights = _load_weights(config, read_spec(Path(config.model_path)), lambda text: None)
    return StagedAdapters(AdapterLoader(weights, PageLayout(weights.spec, config.rows_per_page)), sys.maxsize)


def _load_weights(config: RunnerConfig, spec: ModelSpec, report_progress: Callable[[str], None]) -> DecoderWeights:
    device = torch_device(config)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or num_usable_cores())
        _LOGGER.log(logging.INFO if binding.is_available() else logging.WARNING, binding.describe())
    else:
        torch.cuda.set_device(device)
    return load_weights(
        Path(config.model_path),
        spec,
        torch_dtype(config, spec, device),
        device,
        lambda done, total: report_progress(f"loading weights {100 * done // total}%"),
        Quantization(config.quantization),
    )

"""How much of the memory is taken, and how it is split between KV blocks and adapter pages."""

from dataclasses import dataclass

import torch

from pomona.core.errors import ConfigError
from pomona.core.machine import available_host_bytes
from pomona.model.lora import PageLayout
from pomona.model.spec import ModelSpec
from pomona.runner.config import GIB, RunnerConfig
from pomona.runner.kv_cache import block_bytes
from pomona.runner.sampler import DRAW_BYTES, PROMPT_LOGITS_ROWS, rows_at_once

_CPU_FRACTION = 0.5
"""Share of the free host memory that KV blocks and adapter pages may take together."""
_ADAPTER_FRACTION = 0.2
"""Adapters' share of what is left after the weights, unless adapter_bytes says otherwise."""
_MAX_ADAPTER_BYTES = 8 * GIB
_MAX_WASTE = 0.25
"""Of a page's size, what may be lost by making it up from whole KV blocks."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits."""

    num_kv_blocks: int
    """KV blocks that are never an adapter's."""
    num_adapter_pages: int
    blocks_per_page: int
    """KV blocks in the place of which an adapter page stands; 0 if pages have memory of their own."""

    @property
    def num_blocks_in_all(self) -> int:
        """KV blocks that there may be while no adapter is resident."""
        return self.num_kv_blocks + self.num_adapter_pages * self.blocks_per_page


def plan_capacity(
    config: RunnerConfig,
    spec: ModelSpec,
    layout: PageLayout,
    *,
    max_model_len: int,
    device: torch.device,
    reserved_bytes: int = 0,
) -> Capacity:
    """Split the memory that is left after the weights were loaded.

    Args:
        config: settings, some of which fix a part's size.
        spec: the base model.
        layout: of adapter pages.
        max_model_len: tokens that one sequence must be able to have.
        device: where the memory is.
        reserved_bytes: what captured graphs and their scrap blocks will take.

    Raises:
        ConfigError: not even one sequence of max_model_len tokens fits; says what to change.
    """
    dtype_bytes = torch_dtype(config, spec, device).itemsize
    budget = max(0, _free_bytes(config, spec, device) - reserved_bytes)
    per_block = block_bytes(spec, config.block_size, torch_dtype(config, spec, device))
    blocks_per_page = _blocks_per_page(layout.page_elems * dtype_bytes, per_block)
    page_bytes = blocks_per_page * per_block or layout.page_elems * dtype_bytes
    adapter_bytes = config.adapter_bytes
    if adapter_bytes is None:
        adapter_bytes = min(int(budget * _ADAPTER_FRACTION), _MAX_ADAPTER_BYTES)
        if config.kv_cache_bytes is not None and device.type == "cuda":
            # A GPU's memory has an end; that of a host, of which the budget is only a part, may be asked for more.
            adapter_bytes = min(adapter_bytes, max(0, budget - config.kv_cache_bytes))
    num_pages = adapter_bytes // page_bytes
    blocks_per_seq = -(-max_model_len // config.block_size)
    if config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // per_block
    else:
        num_blocks = min(max(0, budget - adapter_bytes) // per_block, config.max_num_seqs * blocks_per_seq)
    if num_blocks < blocks_per_seq:
        raise ConfigError(
            f"the KV cache holds {num_blocks * config.block_size} tokens but max_model_len is {max_model_len}: "
            f"raise kv_cache_bytes to at least {blocks_per_seq * per_block} or lower max_model_len"
        )
    return Capacity(num_kv_blocks=num_blocks, num_adapter_pages=num_pages, blocks_per_page=blocks_per_page)


def _blocks_per_page(page_bytes: int, per_block: int) -> int:
    """Whole blocks that hold a page; 0 if too much of them would be left over."""
    num_blocks = -(-page_bytes // per_block)
    return num_blocks if num_blocks * per_block - page_bytes <= _MAX_WASTE * page_bytes else 0


def _free_bytes(config: RunnerConfig, spec: ModelSpec, device: torch.device) -> int:
    if device.type != "cuda":
        return int(available_host_bytes() * _CPU_FRACTION)
    torch.cuda.empty_cache()  # what packing the weights left behind
    free, total = torch.cuda.mem_get_info(device)
    reserve = _activation_bytes(config, spec)
    return int(total * config.gpu_memory_fraction) - (total - free) - reserve


def _activation_bytes(config: RunnerConfig, spec: ModelSpec) -> int:
    """Upper estimate of a step's temporaries: the widest layer's rows in float32, the logits of every sequence or of a
    prompt's positions, and what drawing from them takes."""
    row = 4 * (8 * spec.hidden_size + 4 * spec.intermediate_size + 2 * (spec.q_size + 2 * spec.kv_size))
    num_logits_rows = max(config.max_num_seqs, min(PROMPT_LOGITS_ROWS, config.max_num_batched_tokens))
    logits = 4 * num_logits_rows * spec.vocab_size * 4
    drawing = DRAW_BYTES * min(config.max_num_seqs, rows_at_once(spec.vocab_size)) * spec.vocab_size
    return config.max_num_batched_tokens * row + logits + drawing


def torch_device(config: RunnerConfig) -> torch.device:
    """The device that the config means; a GPU has its number.

    Raises:
        ConfigError: there is no such device.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {config.device!r}: must be auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {config.device!r}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    device = torch.device("cuda", device.index or 0)
    if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
        raise ConfigError(f"device is {config.device!r} but PyTorch finds {torch.cuda.device_count()} CUDA devices")
    return device


def torch_dtype(config: RunnerConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """Serving dtype: as asked, or the checkpoint's own (CPUs compute float16 slowly, so there it becomes float32)."""
    name = spec.dtype if config.dtype == "auto" else config.dtype
    if config.dtype == "auto" and name == "float16" and device.type == "cpu":
        name = "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]

"""Tile sizes, warps and pipeline stages as data: ``configs.json``, written by benchmarks/kernels/tune_triton.py.

The file maps GPU name -> op -> list of entries; ``default`` serves every GPU, or op of a GPU, that it does not name. An
entry applies to shapes up to its ``up_to`` bounds; the first that applies is taken, and the last has no bounds.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("configs.json")
DEFAULT = "default"

Config = Mapping[str, int]
"""Parameter -> value."""

PARAMETERS: dict[str, tuple[str, ...]] = {
    "lora": ("rows_per_chunk",),
    "lora_shrink": ("block_k", "max_block_r", "max_splits", "num_warps", "num_stages"),
    "lora_expand": ("block_n", "max_block_r", "num_warps", "num_stages"),
    "attention": ("block_m", "block_n", "split_tokens", "num_warps", "num_stages"),
    "attention_merge": ("block_splits", "num_warps"),
    "norm": ("num_warps",),
    "rope": ("block_heads", "num_warps"),
    "write_kv": ("num_warps",),
    "silu_mul": ("block", "num_warps"),
    "int8_linear": ("block_m", "block_n", "block_k", "num_warps", "num_stages"),
}
"""What every entry of an op must have."""

BOUNDS: dict[str, tuple[str, ...]] = {
    "lora": ("num_tokens",),
    "lora_shrink": ("num_tokens", "in_features", "max_rank", "element_bytes"),
    "lora_expand": ("num_tokens", "out_features", "max_rank", "element_bytes"),
    "attention": ("query_lanes", "head_dim", "element_bytes"),
    "attention_merge": ("head_dim",),
    "norm": ("features",),
    "rope": ("head_dim",),
    "write_kv": ("kv_width",),
    "silu_mul": ("features",),
    "int8_linear": ("num_tokens", "element_bytes"),
}
"""What an op's entries may be bounded by: the names under which the op gives its shape to ``config_for``."""


@dataclass(frozen=True)
class Entry:
    """The configuration of one shape class of one op."""

    up_to: dict[str, int]
    config: Config


Table = dict[str, dict[str, tuple[Entry, ...]]]
"""GPU name -> op -> entries."""

_overrides: dict[str, Config] = {}


def parse_table(raw: dict[str, dict[str, list[dict[str, Any]]]]) -> Table:
    """Check the file's contents; what is wrong with it is an assertion that names the entry.

    Args:
        raw: as read from JSON.
    """
    table: Table = {}
    for gpu, ops in raw.items():
        table[gpu] = {}
        for op, entries in ops.items():
            parsed = []
            for index, values in enumerate(entries):
                where = f"{gpu}, {op}, entry {index}"
                config = {name: value for name, value in values.items() if name != "up_to"}
                entry = Entry(values.get("up_to", {}), config)
                assert set(config) == set(PARAMETERS[op]), f"{where}: must have the parameters {PARAMETERS[op]}"
                assert set(entry.up_to) <= set(BOUNDS[op]), f"{where}: may be bounded by {BOUNDS[op]}"
                parsed.append(entry)
            assert parsed, f"{gpu}, {op}: no entry"
            assert not parsed[-1].up_to, f"{gpu}, {op}: the last entry must have no bounds"
            table[gpu][op] = tuple(parsed)
    assert set(table.get(DEFAULT, ())) == set(PARAMETERS), f"{DEFAULT} must have the ops {tuple(PARAMETERS)}"
    return table


@cache
def load_table() -> Table:
    """The package's own table."""
    return parse_table(json.loads(PATH.read_text()))


@cache
def gpu_name(device: torch.device) -> str:
    """The name under which a device's entries are kept; ``default`` for what is not a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else DEFAULT


def find_entry(table: Table, gpu: str, op: str, shape: Mapping[str, int]) -> Entry:
    """The first entry that applies.

    Args:
        table: as parsed.
        gpu: a name; ``default``'s entries are taken if the table lacks it or its op.
        op: a key of ``PARAMETERS``.
        shape: every quantity named in ``BOUNDS[op]``.
    """
    entries = table.get(gpu, {}).get(op) or table[DEFAULT][op]
    return next(entry for entry in entries if all(shape[name] <= bound for name, bound in entry.up_to.items()))


@cache
def _cached(op: str, gpu: str, shape: tuple[tuple[str, int], ...]) -> Config:
    return find_entry(load_table(), gpu, op, dict(shape)).config


def config_for(op: str, device: torch.device, **shape: int) -> Config:
    """The configuration of an op at a shape.

    Args:
        op: a key of ``PARAMETERS``.
        device: where the op runs.
        shape: every quantity named in ``BOUNDS[op]``.
    """
    return _overrides.get(op) or _cached(op, gpu_name(device), tuple(shape.items()))


@contextmanager
def use_configs(**configs: Config) -> Iterator[None]:
    """Take one configuration per named op, whatever the shape, while the context lasts. For tests and tuning.

    Args:
        configs: op -> parameters.
    """
    for op, config in configs.items():
        assert set(config) == set(PARAMETERS[op]), f"{op} has the parameters {PARAMETERS[op]}"
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)

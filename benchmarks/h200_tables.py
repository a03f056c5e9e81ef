"""Reduces aiconfigurator's H200 operator tables (ai-dynamo/aiconfigurator @ 095f58a, Apache-2.0, vLLM 0.24.0) to what
two models need, as src/pomona/sim/data/h200-vllm-0.24.json.

    python -m benchmarks.h200_tables FOLDER    # with the parquet files; needs pyarrow

The database has products of n and k on a grid. A projection off the grid takes the time of its neighbours in n,
interpolated, or beyond the grid in proportion to n. Attention is of prompts alone (context) and of one new token per
sequence (generation), per layer.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT
from pomona.sim.hardware import MODELS, ModelShape

OUTPUT = ROOT / "src" / "pomona" / "sim" / "data" / "h200-vllm-0.24.json"
CONFIGURATIONS = (("llama-3.1-8b", 1), ("llama-3.1-70b", 4), ("llama-3.1-70b", 8))
ROWS = (1, 2, 4, 8, 16, 17, 32, 64, 65, 96, 128, 129, 192, 256, 257, 512, 768, 1024, 1536, 2048, 4096, 8192)
_HEAD_DIM = 128

Table = dict[tuple[int, int], dict[int, float]]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(folder / f"{name}_perf_vllm0.24.0.parquet").to_pylist()
    return rows


def gemm_table(rows: list[dict[str, Any]]) -> Table:
    table: Table = defaultdict(dict)
    for row in rows:
        if row["gemm_dtype"] == "bfloat16":
            table[row["n"], row["k"]][row["m"]] = row["latency"] / 1e3
    return dict(table)


def gemm_s(table: Table, num_rows: int, fan_in: int, fan_out: int) -> float:
    """Seconds of a product, between its neighbours on the grid; in k first, then in n."""
    ks = sorted({k for _, k in table})
    return _between(ks, fan_in, lambda k: _gemm_at_k(table, num_rows, k, fan_out))


def _gemm_at_k(table: Table, num_rows: int, fan_in: int, fan_out: int) -> float:
    ns = sorted(n for n, k in table if k == fan_in)
    return _between(ns, fan_out, lambda n: table[n, fan_in][num_rows])


def _between(grid: list[int], value: int, at: Any) -> float:
    below = max((point for point in grid if point <= value), default=grid[0])
    above = min((point for point in grid if point >= value), default=None)
    if above is None:
        return float(at(below)) * value / below
    if above == below:
        return float(at(below))
    share = (value - below) / (above - below)
    return float(at(below)) * (1 - share) + float(at(above)) * share


def configuration(model: ModelShape, num_devices: int, tables: dict[str, Any]) -> dict[str, Any]:
    """Everything of a model on so many devices (tensor parallelism)."""
    hidden, wide = model.hidden_size, model.intermediate_size // num_devices
    q_size, kv_size = model.q_size // num_devices, model.kv_size // num_devices
    products = ((hidden, q_size + 2 * kv_size), (q_size, hidden), (hidden, 2 * wide), (wide, hidden))
    heads, kv_heads = q_size // _HEAD_DIM, max(1, kv_size // _HEAD_DIM)
    return {
        "model": model.name,
        "num_devices": num_devices,
        "rows": list(ROWS),
        "layer_products_s": [
            _round(sum(gemm_s(tables["gemm"], num_rows, *fans) for fans in products)) for num_rows in ROWS
        ],
        "head_s": [
            _round(gemm_s(tables["gemm"], num_rows, hidden, model.vocab_size // num_devices)) for num_rows in ROWS
        ],
        "prefill_s": _attention(tables["context"], heads, kv_heads, lambda row: (row["batch_size"], row["isl"])),
        "decode_s": _attention(tables["generation"], heads, kv_heads, lambda row: (row["batch_size"], row["step"] + 1)),
        "all_reduce_s": _all_reduce(tables["all_reduce"], num_devices),
    }


def _attention(rows: list[dict[str, Any]], heads: int, kv_heads: int, key: Any) -> list[list[float]]:
    """(batch, tokens, seconds per layer), ascending."""
    found = {
        key(row): row["latency"] / 1e3
        for row in rows
        if (row["num_heads"], row["head_dim"], row["window_size"]) == (heads, _HEAD_DIM, 0)
        and row["num_key_value_heads"] == kv_heads
        and row["kv_cache_dtype"] == "bfloat16"
        and row["kernel_source"] == "vllm_flash_attn_fa3"
    }
    return [[batch, tokens, _round(seconds)] for (batch, tokens), seconds in sorted(found.items()) if tokens <= 32768]


def _all_reduce(rows: list[dict[str, Any]], num_devices: int) -> list[list[float]]:
    """(numbers of two bytes, seconds), ascending; none for one device."""
    chosen = {
        row["message_size"]: row["latency"] / 1e3
        for row in rows
        if row["num_gpus"] == num_devices and row["kernel_source"] == "vLLM_custom_graph"
    }
    return [[size, _round(seconds)] for size, seconds in sorted(chosen.items())]


def _round(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    names = {
        "gemm": "gemm",
        "context": "context_attention",
        "generation": "generation_attention",
        "all_reduce": "custom_allreduce",
    }
    tables: dict[str, Any] = {key: read(folder, name) for key, name in names.items()}
    tables["gemm"] = gemm_table(tables["gemm"])
    content = {
        "origin": "ai-dynamo/aiconfigurator @ 095f58a, aic-core/src/aiconfigurator_core/systems/data/h200_sxm",
        "licence": "Apache-2.0",
        "device": "NVIDIA H200, vLLM 0.24.0, bfloat16",
        "made_by": "python -m benchmarks.h200_tables",
        "configurations": [configuration(MODELS[name], devices, tables) for name, devices in CONFIGURATIONS],
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(content, separators=(",", ":")) + "\n")
    print(f"{OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()

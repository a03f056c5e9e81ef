"""Builders for the simulator."""

from typing import Any

from pomona.sim.profile_file import AdapterSize, CostProfile, ErrorEntry, ReplicaSize, TermEntry


def make_profile(**changes: Any) -> CostProfile:
    """A replica of 16,384 KV tokens and 64 adapter pages whose step takes 1 ms, a row 1 µs, and a row beyond the 64th
    10 µs more."""
    error = ErrorEntry(dense="roofline", adapters="none", mean=0.02, p50=0.01, p90=0.04, max=0.1)
    values: dict[str, Any] = {
        "model": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "hardware": "a test",
        "commit": None,
        "pomona_version": "0",
        "created_at": "2026-01-01T00:00:00+00:00",
        "replica": ReplicaSize(
            num_kv_blocks=1024,
            num_adapter_pages=64,
            max_model_len=4096,
            block_size=16,
            max_num_batched_tokens=512,
            max_num_seqs=64,
        ),
        "adapters": (AdapterSize(lora_rank=8, num_pages=2, num_host_bytes=2**20),),
        "step_s": 1e-3,
        "terms": (
            TermEntry(quantity="num_rows", seconds_each=1e-6),
            TermEntry(quantity="num_rows", seconds_each=1e-5, above=64),
            TermEntry(quantity="num_loads", seconds_each=5e-3),
        ),
        "error": error,
        "tried": (error,),
        "num_points": 1,
        "num_samples": 1,
        "measuring_s": 1.0,
    }
    return CostProfile(**(values | changes))


def make_spec(**changes: Any) -> dict[str, Any]:
    """Forty requests at 20 per second to one replica of the profile ``p.json``."""
    values: dict[str, Any] = {
        "replica": {"profile": "p.json"},
        "workload": {
            "kind": "synthetic",
            "num_requests": 40,
            "arrivals": {"kind": "poisson", "rate_per_s": 20.0},
            "prompt_lengths": {"kind": "uniform", "min_tokens": 10, "max_tokens": 100},
            "output_lengths": {"kind": "fixed", "num_tokens": 12},
        },
    }
    return values | changes

"""Compiles Triton kernels for a GPU that is not there, at the shapes of real models, and reads what ptxas says of them.

Run as a program, because Triton decides at import whether it compiles or interprets:

    python -m support.triton_aot 90 hot

prints one JSON line per kernel: those of every step (hot), or of all shapes and ranks (all). Shapes come as tensors on
the meta device, through the same functions that launch.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pomona.kernels.attention import AttentionBatch
from pomona.kernels.linear import QuantizedWeight, dense
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices
from pomona.kernels.triton.launch import Launch

META = torch.device("meta")
DTYPE = torch.bfloat16
ROWS_PER_PAGE = 4
BLOCK_SIZE = 16

_RESOURCES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Compiled:
    """What one kernel became."""

    case: str
    kernel: str
    compute_capability: int
    registers: int
    spill_bytes: int
    """Stores and loads."""
    stack_bytes: int
    shared_bytes: int


class AbsentGpu:
    """Stands where Triton's driver would be: names the target, holds no device."""

    def __init__(self, compute_capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._compute_capability = compute_capability
        self._target = GPUTarget("cuda", compute_capability, 32)

    def get_current_target(self) -> object:
        return self._target

    def get_current_device(self) -> int:
        return self._compute_capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def lora_inputs(
    in_features: int, widths: tuple[int, ...], lora_rank: int, num_tokens: int
) -> tuple[Tensor, Tensor, LoraSlices, LoraRanks, LoraBatch]:
    """(out, x, slices, ranks, batch): every row its own adapter, pages as in a pool of a 32-layer model."""
    page_elems = 32 * ROWS_PER_PAGE * (in_features * len(widths) + sum(widths))

    def pages(features: int) -> Tensor:
        return empty(1000, page_elems).as_strided((1000, ROWS_PER_PAGE, features), (page_elems, features, 1))

    shape = (len(widths), num_tokens)
    num_pages = -(-lora_rank // ROWS_PER_PAGE)
    batch = LoraBatch(
        starts=empty(num_tokens, dtype=torch.int32),
        ends=empty(num_tokens, dtype=torch.int32),
        page_tables=empty(num_tokens, num_pages, dtype=torch.int32),
        host_rows=tuple((row, row + 1) for row in range(num_tokens)),
        host_pages=tuple(tuple(range(num_pages)) for _ in range(num_tokens)),
        max_rank=lora_rank,
    )
    ranks = LoraRanks(
        ranks=empty(*shape, dtype=torch.int32),
        scalings=empty(*shape, dtype=torch.float32),
        host_ranks=((lora_rank,) * num_tokens,) * len(widths),
        host_scalings=((1.0,) * num_tokens,) * len(widths),
    )
    slices = LoraSlices(a=tuple(pages(in_features) for _ in widths), b=tuple(pages(width) for width in widths))
    return empty(num_tokens, sum(widths)), empty(num_tokens, in_features), slices, ranks, batch


def attention_inputs(
    num_heads: int, num_kv_heads: int, head_dim: int, query_len: int, context_len: int, dtype: torch.dtype = DTYPE
) -> tuple[Tensor, tuple[Tensor, Tensor], AttentionBatch]:
    """(query inside a fused projection, caches, batch of four equal sequences)."""
    num_tokens = 4 * query_len
    fused = empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    cache = empty(1000, BLOCK_SIZE, num_kv_heads, head_dim, dtype=dtype)
    batch = AttentionBatch(
        query_starts=empty(5, dtype=torch.int32),
        context_lens=empty(4, dtype=torch.int32),
        block_tables=empty(4, -(-context_len // BLOCK_SIZE), dtype=torch.int32),
        slot_mapping=empty(num_tokens, dtype=torch.int64),
        host_query_lens=(query_len,) * 4,
        host_context_lens=(context_len,) * 4,
    )
    return fused[:, :num_heads], (cache, cache), batch


def _lora_launches(group: str) -> Iterator[tuple[str, Launch]]:
    from pomona.kernels.triton.lora import plan_launches

    sites = {
        "qkv 4096": (4096, (4096, 1024, 1024)),
        "o 4096": (4096, (4096,)),
        "gate_up 4096": (4096, (11008, 11008)),
        "down 11008": (11008, (4096,)),
        "qkv 1024": (1024, (2048, 1024, 1024)),
    }
    chosen = {
        "hot": [("qkv 4096", 16, 64), ("down 11008", 64, 64), ("qkv 1024", 16, 512), ("gate_up 4096", 64, 2048)],
        "all": [(site, rank, rows) for site in sites for rank in (4, 16, 64) for rows in (1, 64, 512, 4096)],
    }[group]
    for site, lora_rank, num_tokens in chosen:
        for launch in plan_launches(*lora_inputs(*sites[site], lora_rank, num_tokens)):
            yield f"{site}, rank {lora_rank}, {num_tokens} rows", launch


def _attention_launches(group: str) -> Iterator[tuple[str, Launch]]:
    from pomona.kernels.triton.attention import attention_launches

    models = {
        "head 64, group 3": (9, 3, 64),
        "head 128, group 4": (32, 8, 128),
        "head 64, group 7": (14, 2, 64),
        "head 256, group 4": (16, 4, 256),
    }
    lens = [(1, 8192), (100, 8192), (1000, 2000)]
    cases = list(itertools.product(models, lens, (None, 1024), (DTYPE, torch.float32)))
    if group != "all":
        cases = list(itertools.product(list(models)[:2], lens, (None,), (DTYPE,)))
        cases += itertools.product(["head 128, group 4"], lens[:2], (None,), (torch.float32,))
    for model, (query_len, context_len), window, dtype in cases:
        query, caches, batch = attention_inputs(*models[model], query_len, context_len, dtype)
        out = empty(*query.shape, dtype=dtype)
        for launch in attention_launches(query, caches, out, batch, scale=0.1, sliding_window=window):
            yield f"{model}, {query_len} of {context_len}, window {window}, {dtype}", launch


def _row_launches(group: str) -> Iterator[tuple[str, Launch]]:
    from pomona.kernels.triton.activation import silu_mul_launch
    from pomona.kernels.triton.attention import write_kv_launch
    from pomona.kernels.triton.norm import norm_launch
    from pomona.kernels.triton.rope import rope_launch

    for hidden in (4096,) if group != "all" else (576, 1024, 4096, 8192):
        x = empty(64, hidden)
        yield f"hidden {hidden}", norm_launch(x, empty(64, hidden), empty(hidden), 1e-5, x)
    fused = empty(64, 48, 128)
    query, key, value = fused[:, :32], fused[:, 32:40], fused[:, 40:]
    cache = empty(1000, BLOCK_SIZE, 8, 128)
    yield "32 heads of 128", norm_launch(query, None, empty(128), 1e-5, empty(64, 32, 128))
    positions = empty(64, dtype=torch.int64)
    yield "32 + 8 heads of 128", rope_launch(query, key, positions, empty(4096, 128, dtype=torch.float32))
    yield "8 heads of 128", write_kv_launch(key, value, cache, cache, positions)
    yield "11008", silu_mul_launch(empty(64, 22016), empty(64, 11008))


def _linear_launches(group: str) -> Iterator[tuple[str, Launch]]:
    from pomona.kernels.triton.linear import int8_launch

    sites = {"4096 to 11008": (4096, 11008), "896 to 151936": (896, 151936), "576 to 49152": (576, 49152)}
    for site, (in_features, out_features) in sites.items():
        weight = QuantizedWeight(
            empty(out_features, in_features, dtype=torch.int8), empty(out_features, dtype=torch.float32), DTYPE
        )
        for num_tokens in (1, 16, 64, 4096):
            if group == "all" or site == "4096 to 11008":
                x, out = empty(num_tokens, in_features), empty(num_tokens, out_features)
                bias = empty(out_features) if num_tokens == 16 else None
                yield f"int8 {site}, {num_tokens} rows", int8_launch(x, dense(weight), bias, out)


def launches(group: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of a group."""
    yield from _lora_launches(group)
    yield from _attention_launches(group)
    yield from _row_launches(group)
    yield from _linear_launches(group)


def read_resources(ptx: str, compute_capability: int) -> tuple[int, int, int]:
    """(registers, spill bytes, stack bytes) of a program, by the ptxas that Triton uses and its way of calling it."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [
            *(get_ptxas(compute_capability).path, "-v", "--regAllocOptLevel=2"),
            *(f"--gpu-name={sm_arch_from_capability(compute_capability)}", source.name, "-o", "/dev/null"),
        ]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    resources, registers = _RESOURCES.search(log), _REGISTERS.search(log)
    assert resources is not None, log
    assert registers is not None, log
    stack, stores, loads = (int(number) for number in resources.groups())
    return int(registers.group(1)), stores + loads, stack


def compile_all(compute_capability: int, group: str) -> Iterator[Compiled]:
    """Compile a group of launches, each distinct program once."""
    from triton.runtime import driver

    driver.set_active(AbsentGpu(compute_capability))
    seen: set[int] = set()
    for case, launch in launches(group):
        program = launch.compile()
        if id(program) in seen:
            continue
        seen.add(id(program))
        registers, spill_bytes, stack_bytes = read_resources(program.asm["ptx"], compute_capability)
        yield Compiled(
            case=case,
            kernel=program.metadata.name,
            compute_capability=compute_capability,
            registers=registers,
            spill_bytes=spill_bytes,
            stack_bytes=stack_bytes,
            shared_bytes=program.metadata.shared,
        )


if __name__ == "__main__":
    for compiled in compile_all(int(sys.argv[1]), sys.argv[2]):
        print(json.dumps(asdict(compiled)), flush=True)

"""Loads the compiled kernels (native/, built by setup.py) and declares their C signatures. Nothing here computes.

``python -m pomona.kernels.cpu.binding`` prints whether they are available, for which instruction sets, or why not.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, Structure, c_float, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

ISAS = ("plain", "avx2", "avx512", "avx512bf16", "amx")
"""Instruction sets, worst first; the index is the number the library uses."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute in; tensors of other dtypes go to the reference."""

MAX_SLICES = 4
MAX_HEAD_DIM = 256
MAX_RANK = 1024

_ABI = 8


class LoraSite(Structure):
    """Adapter pages of one site (struct LoraSite in native/api.h)."""

    _fields_ = [
        ("num_slices", c_int64),
        ("in_features", c_int64),
        ("rows_per_page", c_int64),
        ("out_features", c_int64 * MAX_SLICES),
        ("a", c_void_p * MAX_SLICES),
        ("b", c_void_p * MAX_SLICES),
        ("a_page_stride", c_int64 * MAX_SLICES),
        ("b_page_stride", c_int64 * MAX_SLICES),
    ]


class LoraStep(Structure):
    """Segments of one step (struct LoraStep)."""

    _fields_ = [
        ("num_segments", c_int64),
        ("num_blocks", c_int64),
        ("max_pages", c_int64),
        ("max_rank", c_int64),
        ("num_tokens", c_int64),
        ("blocks", c_void_p),
        ("page_tables", c_void_p),
        ("page_shifts", c_void_p),
    ]


class AttentionStep(Structure):
    """Sequences of one step (struct AttentionStep)."""

    _fields_ = [
        ("blocks", c_void_p),
        ("block_tables", c_void_p),
        ("num_blocks", c_int64),
        ("max_blocks", c_int64),
        ("max_context", c_int64),
    ]


_SIGNATURES: dict[str, list[type]] = {
    # dtype, num_threads, phases, site, step, ranks, scalings, x, x_stride, out, out_stride, v
    "pomona_lora": [c_int, c_int, c_int, *[c_void_p] * 5, c_int64, c_void_p, c_int64, c_void_p],
    # dtype, num_threads, step, query, strides of row and head, num_heads, caches, block strides, block_size,
    # num_kv_heads, head_dim, window, scale, out
    "pomona_attention": [
        *[c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p],
        *[c_int64, c_int64, c_int64, c_int64, c_int64, c_int64, c_float, c_void_p],
    ],
    # dtype, num_threads, x, num_rows, x_stride, packed, scales, bias, out, in_features, out_features, is_out_float
    "pomona_gemm": [c_int, c_int, c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_int64, c_int64, c_int],
    # as pomona_gemm up to out_features; then site, step, ranks, scalings
    "pomona_adapted_gemm": [
        *[c_int, c_int, c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_int64, c_int64],
        *[c_void_p] * 4,
    ],
    # dtype, num_threads, x, residual, weight, out, num_outer, num_inner, outer_stride, inner_stride, features, eps
    "pomona_norm": [c_int, c_int, *[c_void_p] * 4, *[c_int64] * 5, c_float],
    # dtype, num_threads, query, key, value, key_cache, value_cache, positions, slots, cos_sin, num_tokens, num_heads,
    # num_kv_heads, head_dim, strides of query, key and value, block strides of the caches, block_size
    "pomona_rope": [c_int, c_int, *[c_void_p] * 8, *[c_int64] * 10],
    # dtype, num_threads, gate_up, out, num_rows, features, row_stride
    "pomona_silu_mul": [c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64],
    # num_threads, logits, num_rows, vocab_size, row_stride, token_ids, is_finite
    "pomona_greedy": [c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p],
    # dtype, num_threads, packed, scales, row_ids, out, num_rows, in_features, is_grouped
    "pomona_gather": [c_int, c_int, *[c_void_p] * 4, c_int64, c_int64, c_int],
    "pomona_begin_recording": [],
    "pomona_end_recording": [],
    "pomona_free_recording": [c_void_p],
    "pomona_replay": [c_void_p],
    # recording, two addresses for each LoRA call
    "pomona_set_ranks": [c_void_p, c_void_p],
    "pomona_set_isa": [c_int],
    "pomona_use_gomp": [c_void_p],
}


def _find_library() -> Path | None:
    folder = Path(__file__).parent
    candidates = (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def _load(path: Path | None) -> tuple[CDLL | None, str]:
    """The library at a path, or None and the reason."""
    if path is None:
        return None, "not built: no C++ compiler when pomona was installed, or an install that skipped setup.py"
    try:
        library = CDLL(str(path))
        if library.pomona_abi() != _ABI:
            return None, f"{path.name} is from another version: install pomona again"
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}"
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = None
    library.pomona_begin_recording.restype = c_void_p
    return library, ""


def _share_torch_threads(library: CDLL) -> bool:
    """Hand over the OpenMP runtime that torch uses. True if there is one: without it kernels run on one thread."""
    try:
        parallel = ctypes.cast(CDLL(None).GOMP_parallel, c_void_p)
    except (OSError, AttributeError):
        return False
    library.pomona_use_gomp(parallel)
    return True


_library, REASON = _load(_find_library())
"""REASON: why the kernels are not available; empty if they are."""
HAS_THREADS = _library is not None and _share_torch_threads(_library)


def is_available() -> bool:
    """True if the compiled kernels can be used in this process."""
    return _library is not None


def library() -> CDLL:
    """The loaded library; only to be called where ``is_available()``."""
    assert _library is not None, f"CPU kernels are not available: {REASON}"
    return _library


def load(path: Path) -> CDLL:
    """Another build of the library, for ``use_library``.

    Raises:
        OSError: there is none at ``path``, or one of another interface.
    """
    other, reason = _load(path)
    if other is None:
        raise OSError(reason)
    _share_torch_threads(other)
    return other


@contextmanager
def use_library(other: CDLL) -> Iterator[None]:
    """Run every kernel of the process with another build while the context lasts. For benchmarks."""
    global _library
    before, _library = _library, other
    try:
        yield
    finally:
        _library = before


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this processor can run, worst first; empty if the kernels are not available."""
    return ISAS[: library().pomona_best_isa() + 1] if is_available() else ()


def uses_tiles(dtype: int) -> bool:
    """True if products of a dtype, as the kernels number them, are made by tile registers (AMX)."""
    return dtype == DTYPES[torch.bfloat16] and ISAS[library().pomona_isa()] == "amx"


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run every kernel of the process with another instruction set while the context lasts. For tests and benchmarks.

    Args:
        name: one of ``available_isas()``.
    """
    assert name in available_isas(), f"instruction set {name} is not available here"
    before = library().pomona_isa()
    library().pomona_set_isa(ISAS.index(name))
    try:
        yield
    finally:
        library().pomona_set_isa(before)


Lend = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Makes uninitialized memory of a shape and dtype."""


class _Allocation(threading.local):
    """How the calling thread allocates kernels' results."""

    empty: Lend | None = None
    is_recording: bool = False


_allocation = _Allocation()


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized CPU memory for a kernel's result."""
    lend = _allocation.empty
    return torch.empty(shape, dtype=dtype) if lend is None else lend(shape, dtype)


def is_recording() -> bool:
    """True while this thread's native calls are recorded: a call that is idle now may not be in a replay."""
    return _allocation.is_recording


@contextmanager
def allocate_with(lend: Lend) -> Iterator[None]:
    """Let another allocator make kernels' results on this thread while the context lasts."""
    before = _allocation.empty
    _allocation.empty = lend
    try:
        yield
    finally:
        _allocation.empty = before


@contextmanager
def record_with(lend: Lend) -> Iterator[None]:
    """Likewise, while this thread's native calls are recorded."""
    assert not _allocation.is_recording, "a recording inside a recording"
    _allocation.is_recording = True
    try:
        with allocate_with(lend):
            yield
    finally:
        _allocation.is_recording = False


def address_of(struct: Structure) -> int:
    """Where a structure is, for a library call; the caller keeps the structure alive."""
    return ctypes.addressof(struct)


def describe() -> str:
    """One line for people: what will run, or why nothing will."""
    if not is_available():
        return f"CPU kernels: not available ({REASON}); torch does their work"
    threads = "torch's threads" if HAS_THREADS else "one thread: torch's OpenMP runtime was not found"
    return f"CPU kernels: {ISAS[library().pomona_isa()]}, of {', '.join(available_isas())}; {threads}"


if __name__ == "__main__":
    print(describe())  # noqa: T201

"""RunnerConfig: where the model is and how much memory the runner may take. Sizes found at start-up are results."""

from dataclasses import dataclass

from pomona.core.errors import ConfigError
from pomona.core.machine import MAX_THREADS

GIB = 2**30


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Settings of the tensor runner."""

    model_path: str
    """Local folder of a Hugging Face checkpoint."""
    dtype: str = "auto"
    """auto (the checkpoint's own; float32 instead of float16 on CPU), float32, bfloat16 or float16."""
    quantization: str = "none"
    """How the base's matrices are stored: none (in the serving dtype) or int8."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, or cuda:N."""
    block_size: int = 16
    """Token positions per KV block."""
    max_model_len: int | None = None
    """Longest prompt + output, tokens; None takes the checkpoint's max_position_embeddings."""
    max_num_seqs: int = 256
    """Most sequences in one step."""
    max_num_batched_tokens: int = 2048
    """Most rows in one step; bounds the step's temporaries."""
    kv_cache_bytes: int | None = None
    """Memory for KV blocks that is never an adapter's; None sizes it from the free memory and what max_num_seqs full
    contexts could use."""
    adapter_bytes: int | None = None
    """Device memory that resident adapters may take, and KV while they do not. None takes a fifth of what is free, at
    most 8 GiB."""
    adapter_link_bytes_per_s: float | None = None
    """Adapters are copied to the device no faster than this, to rehearse slow links; None: as fast as it goes."""
    rows_per_page: int = 4
    """Rank rows per adapter page; an adapter's rank is rounded up to a multiple of this in memory, never in compute."""
    gpu_memory_fraction: float = 0.9
    """Share of a GPU's memory that weights, KV blocks and adapters may take together."""
    decode_graphs: bool | None = None
    """Capture decode steps and replay them; None does so on CUDA. On a CPU, steps are padded alike and called anew."""
    graph_batch_sizes: tuple[int, ...] = ()
    """Rows of the captured steps; none means a choice up to max_num_seqs."""
    graph_max_lora_rank: int = 64
    """Steps with an adapter of larger rank are not replayed."""
    num_threads: int | None = None
    """CPU threads of the model step; None takes the cores this process may use."""

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}: must be auto, float32, bfloat16 or float16")
        if self.quantization not in ("none", "int8"):
            raise ConfigError(f"quantization is {self.quantization!r}: must be none or int8")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "rows_per_page", "graph_max_lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 1")
        for name in ("max_model_len", "kv_cache_bytes", "adapter_bytes", "adapter_link_bytes_per_s", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: must be at least 1")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"num_threads is {self.num_threads}: must be at most {MAX_THREADS}")
        sizes = self.graph_batch_sizes
        if any(size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
            raise ConfigError(f"graph_batch_sizes is {sizes}: must be positive and ascending")
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            raise ConfigError(f"gpu_memory_fraction is {self.gpu_memory_fraction}: must be in (0, 1]")

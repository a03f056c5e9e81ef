"""What an engine turned out to be once it was built: results of start-up that the server needs, never settings."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of a running engine; they do not change while its process lives."""

    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""
    vocab_size: int
    block_size: int
    """Token positions per KV block."""
    num_kv_blocks: int
    num_adapter_pages: int
    dtype: str
    """Of activations, adapters, and weights unless they are quantized: "bfloat16"."""
    device: str
    """For people: "cpu (16 threads, avx512)", "cuda:0 (NVIDIA H200)"."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, from the checkpoint's config; () if it names none."""
    quantization: str = "none"
    """Of the base's matrices: none or int8."""

    @property
    def precision(self) -> str:
        """For people: "bfloat16", "bfloat16 over int8 weights"."""
        return self.dtype if self.quantization == "none" else f"{self.dtype} over {self.quantization} weights"

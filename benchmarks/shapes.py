"""The dimensions of the models that benchmarks run: real models' shapes with random weights, since speed does not
depend on what the weights say. Standard library only: other systems' environments import this too.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-like decoder's dimensions."""

    name: str
    architecture: str
    """As in config.json: LlamaForCausalLM or Qwen2ForCausalLM."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    is_tied: bool = True
    has_qkv_bias: bool = False

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """The seven adaptable projections of one layer -> (in_features, out_features)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, self.q_size),
            "k_proj": (hidden, self.kv_size),
            "v_proj": (hidden, self.kv_size),
            "o_proj": (self.q_size, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all projections of all layers, without embedding, lm_head and biases."""
        return self.num_layers * sum(fan_in * fan_out for fan_in, fan_out in self.targets.values())

    @property
    def num_parameters(self) -> int:
        """Every weight once, a tied lm_head not counted again."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        biases = self.num_layers * (self.q_size + 2 * self.kv_size) if self.has_qkv_bias else 0
        embeddings = (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size
        return self.linear_parameters + norms + biases + embeddings

    def lora_parameters(self, lora_rank: int) -> int:
        """Weights of an adapter of this rank on all seven projections."""
        return self.num_layers * lora_rank * sum(fan_in + fan_out for fan_in, fan_out in self.targets.values())

    def hf_config(self, max_position_embeddings: int = 8192) -> dict[str, Any]:
        """The config.json of a bfloat16 checkpoint of this shape."""
        return {
            "architectures": [self.architecture],
            "model_type": {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}[self.architecture],
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.is_tied,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


SMOLLM2_135M = ModelShape(
    name="smollm2-135m",
    architecture="LlamaForCausalLM",
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
)
"""HuggingFaceTB/SmolLM2-135M."""

QWEN25_05B = ModelShape(
    name="qwen2.5-0.5b",
    architecture="Qwen2ForCausalLM",
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=151936,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    has_qkv_bias=True,
)
"""Qwen/Qwen2.5-0.5B."""

LLAMA3_8B = ModelShape(
    name="llama3-8b",
    architecture="LlamaForCausalLM",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    is_tied=False,
)
"""meta-llama/Meta-Llama-3-8B: for GPUs."""

TINY = ModelShape(
    name="tiny",
    architecture="LlamaForCausalLM",
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=1024,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
)
"""For trying a script out."""

SHAPES = {shape.name: shape for shape in (SMOLLM2_135M, QWEN25_05B, LLAMA3_8B, TINY)}

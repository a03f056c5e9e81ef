"""ModelSpec: what the decoder needs to know of a checkpoint. ``hf_config.read_spec`` makes it from config.json.

Target: one of the seven linear layers of a decoder layer that LoRA usually adapts. Site: targets that read the same
input and are computed as one product (q, k, v; gate, up).
"""

import enum
from dataclasses import dataclass


class Target(enum.IntEnum):
    """The adaptable projections of one decoder layer, in the order in which their weights are laid out."""

    Q = 0
    K = 1
    V = 2
    O = 3  # noqa: E741
    GATE = 4
    UP = 5
    DOWN = 6


TARGET_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET_PARENTS = ("self_attn",) * 4 + ("mlp",) * 3


class Site(enum.Enum):
    """Targets that share an input, hence one matrix product and one LoRA launch."""

    QKV = (Target.Q, Target.K, Target.V)
    O = (Target.O,)  # noqa: E741
    GATE_UP = (Target.GATE, Target.UP)
    DOWN = (Target.DOWN,)

    __hash__ = object.__hash__  # members are single; Enum's own is Python code, and every layer looks sites up


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: base frequency and the scaling of Hugging Face's ``rope_scaling`` / ``rope_parameters``."""

    theta: float = 10000.0
    kind: str = "default"
    """default, linear, dynamic, llama3 or yarn."""
    params: tuple[tuple[str, float | int | bool], ...] = ()
    """The scaling's own numbers, under their names in config.json."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Dimensions and switches of a Llama-like decoder."""

    architecture: str
    """LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    is_tied: bool
    """lm_head shares the embedding's weight."""
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    """One per layer: attend to this many latest tokens (itself included); None is full attention."""
    dtype: str = "float32"
    """The checkpoint's own dtype: float32 (also for float64), float16 or bfloat16."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def target_shape(self, target: Target) -> tuple[int, int]:
        """(in_features, out_features) of a target."""
        return {
            Target.Q: (self.hidden_size, self.q_size),
            Target.K: (self.hidden_size, self.kv_size),
            Target.V: (self.hidden_size, self.kv_size),
            Target.O: (self.q_size, self.hidden_size),
            Target.GATE: (self.hidden_size, self.intermediate_size),
            Target.UP: (self.hidden_size, self.intermediate_size),
            Target.DOWN: (self.intermediate_size, self.hidden_size),
        }[target]

    def has_bias(self, target: Target) -> bool:
        """True if the base layer has a bias."""
        if target in (Target.Q, Target.K, Target.V):
            return self.has_qkv_bias
        return self.has_o_bias if target is Target.O else self.has_mlp_bias

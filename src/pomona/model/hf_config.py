"""config.json of a Hugging Face checkpoint -> ModelSpec, in the style of transformers 4 or 5.

Every field that changes the network's output is honoured or refused by name. The hundreds of other keys that
checkpoints carry are ignored.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.core.errors import CheckpointError
from pomona.model.rope import read_rope
from pomona.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Family:
    """What transformers assumes for an architecture: fixed switches, and defaults of fields that config.json omits."""

    has_qkv_bias: bool | None = False
    """None: config.json's ``attention_bias`` decides, for o_proj too."""
    has_mlp_bias: bool | None = False
    """None: config.json's ``mlp_bias`` decides."""
    has_qk_norm: bool = False
    num_kv_heads: int | None = None
    """None: as many as attention heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    has_window_layers: bool = False
    """``use_sliding_window`` and ``max_window_layers`` or ``layer_types`` choose the layers with a window."""


_FAMILIES = {
    "LlamaForCausalLM": _Family(has_qkv_bias=None, has_mlp_bias=None, bos_token_id=1, eos_token_id=2),
    "MistralForCausalLM": _Family(
        num_kv_heads=8, sliding_window=4096, max_position_embeddings=131072, bos_token_id=1, eos_token_id=2
    ),
    "Qwen2ForCausalLM": _Family(
        has_qkv_bias=True,
        num_kv_heads=32,
        sliding_window=4096,
        max_position_embeddings=32768,
        has_window_layers=True,
    ),
    "Qwen3ForCausalLM": _Family(
        has_qkv_bias=None,
        has_qk_norm=True,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        max_position_embeddings=32768,
        has_window_layers=True,
    ),
}

# Fields of other architectures (or rare switches of these) that would change the output, with the values that do not.
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_softcapping": (None, 0),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "clip_qkv": (None,),
    "qk_layernorm": (None, False),
    "use_qk_norm": (None, False),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "query_pre_attn_scalar": (None,),
    "rope_interleave": (None, False),
    "rope_interleaved": (None, False),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "dual_chunk_attention_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "per_layer_config": (None, {}),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}

_DTYPES = ("float32", "float16", "bfloat16")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing, not JSON, or not an object.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return parsed


class _Fields:
    """config.json with typed access; every complaint names the file, the field and the value."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.raw = read_json(path)

    def refuse(self, name: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {name} is {self.raw.get(name)!r}: {message}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self._path}: {name} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(name, "must be a positive integer")
        return value

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return bool(value)

    def positive(self, name: str, default: float) -> float:
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
            raise self.refuse(name, "must be a positive number")
        return float(value)

    def token_ids(self, name: str, default: int | None) -> tuple[int, ...]:
        value = self.raw.get(name, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
            raise self.refuse(name, "must be a token id or a list of token ids")
        return tuple(token_id for token_id in ids if token_id >= 0)


def read_spec(folder: Path) -> ModelSpec:
    """Read config.json (and the end-of-sequence ids of generation_config.json, if there is one).

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: a file is missing or broken, the architecture is not supported, or a field has a value that
            Pomona does not honour; the message names it.
    """
    fields = _Fields(folder / "config.json")
    architecture, family = _family(fields)
    _refuse_unsupported(fields, family)
    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    num_kv_heads = fields.integer("num_key_value_heads", _num_kv_heads(fields, family, num_heads))
    if num_heads % num_kv_heads != 0:
        raise fields.refuse("num_key_value_heads", f"must divide num_attention_heads, {num_heads}")
    has_attention_bias = fields.flag("attention_bias") if family.has_qkv_bias is None else False
    max_positions = fields.integer("max_position_embeddings", family.max_position_embeddings)
    rope, max_positions = read_rope(fields.raw, max_positions)
    bos_token_ids = fields.token_ids("bos_token_id", family.bos_token_id)
    return ModelSpec(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, family, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        rope=rope,
        is_tied=fields.flag("tie_word_embeddings"),
        has_qkv_bias=has_attention_bias or bool(family.has_qkv_bias),
        has_o_bias=has_attention_bias,
        has_mlp_bias=fields.flag("mlp_bias") if family.has_mlp_bias is None else False,
        has_qk_norm=family.has_qk_norm,
        sliding_windows=_sliding_windows(fields, family, num_layers),
        dtype=_dtype(fields),
        eos_token_ids=_eos_token_ids(folder, fields, family),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
    )


def _family(fields: _Fields) -> tuple[str, _Family]:
    named = fields.raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise fields.refuse("architectures", f"supported are {', '.join(_FAMILIES)}")
    return architecture, _FAMILIES[architecture]


def _refuse_unsupported(fields: _Fields, family: _Family) -> None:
    for name, neutral in _NEUTRAL_VALUES.items():
        if fields.raw.get(name) not in neutral:
            raise fields.refuse(name, "not supported")
    if fields.raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.refuse("hidden_act", "only silu is supported")
    if family.has_qkv_bias is not None and fields.raw.get("attention_bias") not in (None, family.has_qkv_bias):
        raise fields.refuse("attention_bias", "not supported for this architecture")
    if family.has_mlp_bias is not None and fields.flag("mlp_bias"):
        raise fields.refuse("mlp_bias", "not supported for this architecture")


def _num_kv_heads(fields: _Fields, family: _Family, num_heads: int) -> int:
    # A field that is present but null means "as many as attention heads" everywhere.
    is_null = "num_key_value_heads" in fields.raw
    return num_heads if is_null or family.num_kv_heads is None else family.num_kv_heads


def _head_dim(fields: _Fields, family: _Family, hidden_size: int, num_heads: int) -> int:
    is_null = "head_dim" in fields.raw
    default = hidden_size // num_heads if is_null or family.head_dim is None else family.head_dim
    head_dim = fields.integer("head_dim", default or None)
    if head_dim % 2 != 0:
        raise fields.refuse("head_dim", f"rotary embeddings need an even number, not {head_dim}")
    return head_dim


def _sliding_windows(fields: _Fields, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    """One entry per layer. Llama has no windows, Mistral one for all layers, Qwen one for chosen layers."""
    window = None
    if fields.raw.get("sliding_window", family.sliding_window) is not None:
        window = fields.integer("sliding_window", family.sliding_window)
    first_with_window = 0
    if family.has_window_layers:
        window = window if fields.flag("use_sliding_window") else None
        # 0 means every layer, which ``integer`` would refuse.
        is_zero = fields.raw.get("max_window_layers") == 0
        first_with_window = 0 if is_zero else fields.integer("max_window_layers", 28)
    elif fields.raw.get("use_sliding_window") is False and family.sliding_window is None:
        window = None
    elif window is not None and (family.sliding_window is None or fields.raw.get("use_sliding_window") is False):
        raise fields.refuse("sliding_window", "not supported for this architecture and use_sliding_window")
    windows = tuple(window if layer >= first_with_window else None for layer in range(num_layers))
    if fields.raw.get("layer_types") is None:
        return windows
    by_type = {"full_attention": None, "sliding_attention": window}
    layer_types = fields.raw["layer_types"]
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or any(not isinstance(name, str) or name not in by_type for name in layer_types)
    ):
        raise fields.refuse("layer_types", f"must list {' or '.join(by_type)} for each of {num_layers} layers")
    if window is None and "sliding_attention" in layer_types:
        raise fields.refuse("layer_types", "sliding_attention needs a sliding_window in use")
    if not family.has_window_layers and windows != tuple(by_type[layer_type] for layer_type in layer_types):
        raise fields.refuse("layer_types", "layers that differ are not supported for this architecture")
    return tuple(by_type[layer_type] for layer_type in layer_types)


def _dtype(fields: _Fields) -> str:
    name = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    value = fields.raw.get(name)
    if value is None:
        return "float32"
    dtype = str(value).removeprefix("torch.")
    if dtype == "float64":
        return "float32"  # the widest that there is to serve in
    if dtype not in _DTYPES:
        raise fields.refuse(name, f"supported are {', '.join(_DTYPES)}")
    return dtype


def _eos_token_ids(folder: Path, fields: _Fields, family: _Family) -> tuple[int, ...]:
    ids = fields.token_ids("eos_token_id", family.eos_token_id)
    generation = folder / "generation_config.json"
    if generation.is_file():
        ids += _Fields(generation).token_ids("eos_token_id", None)
    # An id that is none of the vocabulary's is never sampled.
    return tuple(token_id for token_id in dict.fromkeys(ids) if token_id < fields.integer("vocab_size"))

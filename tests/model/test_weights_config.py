"""config.json: both styles are read, everything that changes the output is honoured or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pomona.core.errors import CheckpointError
from pomona.model.hf_config import read_spec
from pomona.model.rope import cos_sin_table
from pomona.model.spec import ModelSpec, RopeSpec, Target

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 2,  # early Llama 2: how a product is split, not what it is
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
    "initializer_range": 0.02,
    "some_key_of_the_future": {"harmless": True},
}


def _spec(folder: Path, config: dict[str, Any]) -> ModelSpec:
    kept = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return read_spec(folder)


def test_a_llama_3_config_of_transformers_4_is_read_completely(tmp_path: Path) -> None:
    assert _spec(tmp_path, LLAMA) == ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=4,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=RopeSpec(
            theta=500000.0,
            kind="llama3",
            params=(
                ("factor", 8.0),
                ("high_freq_factor", 4.0),
                ("low_freq_factor", 1.0),
                ("original_max_position_embeddings", 8192),
            ),
        ),
        is_tied=False,
        sliding_windows=(None,) * 4,
        dtype="bfloat16",
        eos_token_ids=(128001, 128008),
        bos_token_id=128000,
    )


def test_the_same_config_in_the_style_of_transformers_5_is_the_same_spec(tmp_path: Path) -> None:
    new_style = {
        **LLAMA,
        "rope_theta": ...,
        "rope_scaling": ...,
        "rope_parameters": {**LLAMA["rope_scaling"], "rope_theta": 500000.0},
        "torch_dtype": ...,
        "dtype": "bfloat16",
    }
    assert _spec(tmp_path, new_style) == _spec(tmp_path, LLAMA)


def test_end_of_sequence_ids_of_the_generation_config_are_added(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128008, 128009]}))
    assert _spec(tmp_path, LLAMA).eos_token_ids == (128001, 128008, 128009)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert _spec(tmp_path, {**LLAMA, "eos_token_id": None}).eos_token_ids == (7,)


def test_end_of_sequence_ids_that_are_no_token_are_left_out(tmp_path: Path) -> None:
    assert _spec(tmp_path, {**LLAMA, "eos_token_id": [5, LLAMA["vocab_size"]]}).eos_token_ids == (5,)


def test_omitted_fields_take_the_architecture_s_defaults(tmp_path: Path) -> None:
    omitted = dict.fromkeys(("num_key_value_heads", "rope_theta", "rope_scaling", "torch_dtype", "rms_norm_eps"), ...)
    llama = _spec(tmp_path, {**LLAMA, **omitted, "bos_token_id": ..., "eos_token_id": ...})
    assert (llama.num_kv_heads, llama.rope, llama.dtype, llama.rms_norm_eps) == (32, RopeSpec(), "float32", 1e-6)
    assert (llama.bos_token_id, llama.eos_token_ids) == (1, (2,))
    mistral = _spec(tmp_path, {**LLAMA, **omitted, "architectures": ["MistralForCausalLM"]})
    assert (mistral.num_kv_heads, mistral.sliding_windows) == (8, (4096,) * 4)
    qwen3 = _spec(tmp_path, {**LLAMA, **omitted, "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024})
    assert (qwen3.head_dim, qwen3.sliding_windows) == (128, (None,) * 4)


def test_null_head_counts_mean_the_derived_values(tmp_path: Path) -> None:
    spec = _spec(
        tmp_path, {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": None, "head_dim": None}
    )
    assert (spec.num_kv_heads, spec.head_dim) == (32, 128)


@pytest.mark.parametrize(
    "architecture, fields, biased",
    [
        ("LlamaForCausalLM", {}, []),
        ("LlamaForCausalLM", {"attention_bias": True}, [Target.Q, Target.K, Target.V, Target.O]),
        ("LlamaForCausalLM", {"mlp_bias": True}, [Target.GATE, Target.UP, Target.DOWN]),
        ("MistralForCausalLM", {}, []),
        ("Qwen2ForCausalLM", {"attention_bias": ...}, [Target.Q, Target.K, Target.V]),
        ("Qwen3ForCausalLM", {}, []),
        ("Qwen3ForCausalLM", {"attention_bias": True}, [Target.Q, Target.K, Target.V, Target.O]),
    ],
)
def test_biases_follow_the_architecture(
    architecture: str, fields: dict[str, Any], biased: list[Target], tmp_path: Path
) -> None:
    spec = _spec(tmp_path, {**LLAMA, "architectures": [architecture], **fields})
    assert [target for target in Target if spec.has_bias(target)] == biased
    assert spec.has_qk_norm == (architecture == "Qwen3ForCausalLM")


SLIDE, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    "architecture, fields, windows",
    [
        ("Mistral", {"sliding_window": 32}, (32, 32, 32, 32)),
        ("Mistral", {"sliding_window": None}, (None,) * 4),
        ("Mistral", {"sliding_window": 32, "layer_types": [SLIDE] * 4}, (32,) * 4),
        ("Llama", {"sliding_window": None}, (None,) * 4),
        ("Llama", {"sliding_window": 32, "use_sliding_window": False}, (None,) * 4),
        ("Qwen2", {"sliding_window": 32}, (None,) * 4),
        ("Qwen2", {"sliding_window": 32, "use_sliding_window": True}, (None,) * 4),
        ("Qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 32)),
        ("Qwen3", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, (32,) * 4),
        (
            "Qwen2",
            {"sliding_window": 32, "use_sliding_window": True, "layer_types": [SLIDE, FULL, SLIDE, FULL]},
            (32, None, 32, None),
        ),
        ("Qwen3", {"sliding_window": None, "layer_types": [FULL] * 4}, (None,) * 4),
    ],
)
def test_sliding_windows_are_resolved_per_layer(
    architecture: str, fields: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    qwen2 = {"attention_bias": ...} if architecture == "Qwen2" else {}
    spec = _spec(tmp_path, {**LLAMA, **qwen2, "architectures": [f"{architecture}ForCausalLM"], **fields})
    assert spec.sliding_windows == windows


def test_yarn_stretches_the_context_beyond_the_configured_positions(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    spec = _spec(tmp_path, {**LLAMA, "max_position_embeddings": 32768, "rope_scaling": scaling})
    assert spec.max_position_embeddings == 131072
    assert dict(spec.rope.params)["factor"] == 4.0


@pytest.mark.parametrize("factor, num_positions", [(4.0, 16384), (2.5, 10240), (0.5, 4096)])
def test_linear_scaling_stretches_the_configured_positions(factor: float, num_positions: int, tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": factor}
    spec = _spec(tmp_path, {**LLAMA, "max_position_embeddings": 4096, "rope_scaling": scaling})
    assert spec.max_position_embeddings == num_positions


@pytest.mark.parametrize("truncate", [True, False, None, ...])
def test_yarn_truncates_as_transformers_does(truncate: Any, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    if truncate is not ...:
        scaling["truncate"] = truncate
    fields = {**LLAMA, "rope_scaling": ..., "rope_parameters": scaling, "max_position_embeddings": 512}
    spec = _spec(tmp_path, fields)
    config = LlamaConfig(**{name: value for name, value in fields.items() if value is not ...})
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    angles = torch.arange(512.0).unsqueeze(1) * inverse
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
    torch.testing.assert_close(cos_sin_table(spec.rope, spec.head_dim, 512, torch.device("cpu")), expected)


@pytest.mark.parametrize("mscales", [{"mscale": 0, "mscale_all_dim": 0.0}, {"mscale": 0.7, "mscale_all_dim": 0}])
def test_an_mscale_of_zero_means_none_as_in_transformers(mscales: dict[str, float], tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **mscales}
    spec = _spec(tmp_path, {**LLAMA, "rope_scaling": scaling, "max_position_embeddings": 512})
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(rope_parameters=scaling), torch.device("cpu"))
    first_cosine = cos_sin_table(spec.rope, spec.head_dim, 1, torch.device("cpu"))[0, 0]
    assert first_cosine == pytest.approx(factor)


def test_equal_rope_parameters_per_layer_type_are_one_set(tmp_path: Path) -> None:
    same = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}
    nested = {"full_attention": same, "sliding_attention": dict(same)}
    spec = _spec(tmp_path, {**LLAMA, "rope_scaling": ..., "rope_parameters": nested})
    assert spec.rope == RopeSpec(1e5, "linear", (("factor", 2.0),))


def test_dynamic_rope_is_the_default_within_the_configured_positions(tmp_path: Path) -> None:
    spec = _spec(tmp_path, {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}})
    device = torch.device("cpu")
    default = cos_sin_table(RopeSpec(theta=500000.0), 16, 50, device)
    assert torch.equal(cos_sin_table(spec.rope, 16, 50, device), default)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_checkpoint_of_float64_is_one_to_serve_in_float32(name: str, tmp_path: Path) -> None:
    assert _spec(tmp_path, {**LLAMA, "torch_dtype": ..., name: "torch.float64"}).dtype == "float32"


REFUSALS = [
    ({"architectures": ["GPT2LMHeadModel"]}, r"architectures .*GPT2LMHeadModel.*Llama.*Mistral.*Qwen2.*Qwen3"),
    ({"architectures": ...}, r"architectures is None: supported are Llama"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only silu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config .*not supported"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"dual_chunk_attention_config": {"chunk_size": 4}}, "dual_chunk_attention_config"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config .*not supported"),
    ({"sliding_window": 16}, "sliding_window is 16"),
    ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias is True"),
    ({"architectures": ["MistralForCausalLM"], "mlp_bias": True}, "mlp_bias is True"),
    ({"architectures": ["Qwen2ForCausalLM"]}, "attention_bias is False"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 8, "use_sliding_window": False}, "sliding_window"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0: must be a positive"),
    ({"architectures": ["Qwen3ForCausalLM"], "layer_types": [SLIDE] * 4}, "layer_types .*needs a sliding_window"),
    ({"architectures": ["Qwen3ForCausalLM"], "layer_types": [FULL]}, "layer_types .*each of 4 layers"),
    ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ({"architectures": ["Qwen3ForCausalLM"], "layer_types": [[FULL]] * 4}, "layer_types"),
    (
        {"architectures": ["MistralForCausalLM"], "sliding_window": 8, "layer_types": [SLIDE, FULL] * 2},
        "layer_types .*layers that differ",
    ),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is 'longrope': supported are default, linear"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor is -1"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1, 2]}}, "rope_scaling.mrope_section"),
    ({"rope_scaling": {**LLAMA["rope_scaling"], "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ({"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}}, "high_freq_factor is 1.0: must differ"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear': must be an object"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type is \['yarn'\]: supported are"),
    ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2}}, "rope_theta is 1: must be above 1"),
    ({"rope_scaling": {"type": "yarn", "factor": 1e308}}, r"factor is 1e\+308: stretches the context"),
    ({"rope_scaling": {"type": "linear", "factor": 1e308}}, r"factor is 1e\+308: stretches the context"),
    ({"rope_theta": "big"}, "rope_theta is 'big': must be a positive number"),
    (
        {
            "rope_scaling": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        "rope_parameters .*different rotary embeddings",
    ),
    ({"num_key_value_heads": 5}, "num_key_value_heads is 5: must divide"),
    ({"hidden_size": -1}, "hidden_size is -1: must be a positive integer"),
    ({"vocab_size": ...}, "vocab_size is missing"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"head_dim": 7}, "head_dim is 7: rotary embeddings need an even number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
]


@pytest.mark.parametrize("fields, message", REFUSALS, ids=lambda part: part if isinstance(part, str) else "")
def test_what_is_not_honoured_is_refused_by_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        _spec(tmp_path, {**LLAMA, **fields})
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000])
def test_a_broken_config_is_refused_with_its_path(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_spec(tmp_path)


def test_a_missing_config_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file"):
        read_spec(tmp_path)

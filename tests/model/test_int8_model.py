"""An int8 model is the model whose checkpoint holds the dequantized weights, adapters of every kind included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pomona.kernels.linear import quantize, unpack
from pomona.model.spec import Site, Target
from pomona.model.weights import DecoderWeights, Quantization
from support.adapters import ALL_TARGETS, AdaptedDecoder, base_logits, make_adapter, peft_logits
from support.models import PagedSequences, dequantized_checkpoint, load_decoder, make_checkpoint
from support.tolerances import LOGITS_ATOL

PROMPT = [5, 3, 77, 4, 20, 9, 100, 5]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL_TARGETS},
    "dora": {"use_dora": True, "target_modules": ALL_TARGETS},
    "dora on embedding and head": {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
    "embedding and head": {"target_modules": ["lm_head", "embed_tokens"]},
    "saved modules": {"modules_to_save": ["lm_head", "norm", "down_proj"]},
    "tokens": {"trainable_token_indices": [5, 3, 77]},
}


def _without_base_tables(adapter: Path) -> Path:
    """peft saves the base's embedding and lm_head along with LoRA on them, and would write them into any base."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "base_layer" not in name}
    save_file(kept, adapter / "adapter_model.safetensors")
    return adapter


def _assert_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_base_s_logits_are_those_of_the_dequantized_checkpoint(
    architecture: str, is_tied: bool, tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", architecture, tie_word_embeddings=is_tied)
    decoder = load_decoder(base, quantization=Quantization.INT8)
    [logits] = PagedSequences(decoder, 1, 8).step({0: PROMPT}).values()
    _assert_logits(logits, base_logits(dequantized_checkpoint(tmp_path / "dequantized", base), PROMPT))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_see_the_weights_that_are_served(kind: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=kind == "tokens")
    adapter = _without_base_tables(make_adapter(tmp_path / "adapter", base, **KINDS[kind]))
    decoder = AdaptedDecoder(base, quantization=Quantization.INT8)
    with_adapter, alone = decoder.logits([(PROMPT, decoder.add(adapter)), (PROMPT, None)])
    dequantized = dequantized_checkpoint(tmp_path / "dequantized", base)
    _assert_logits(with_adapter, peft_logits(dequantized, adapter, PROMPT))
    _assert_logits(alone, base_logits(dequantized, PROMPT))


@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied"])
def test_the_base_s_own_tables_saved_along_with_an_adapter_are_still_the_base_s(is_tied: bool, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=is_tied)
    decoder = AdaptedDecoder(base, quantization=Quantization.INT8)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "embed_tokens", "lm_head"])
    _, weights = decoder.convert(adapter)
    assert weights.extras is not None
    assert weights.extras.embed_lora is not None
    assert weights.extras.embed_weight is None
    assert weights.extras.lm_head_weight is None


def _weights(tmp_path: Path, quantization: Quantization, **config: Any) -> DecoderWeights:
    path = tmp_path / "base"
    return load_decoder(
        path if path.exists() else make_checkpoint(path, **config), torch.bfloat16, quantization
    ).weights


def test_matrices_are_int8_and_what_is_looked_up_or_small_is_not(tmp_path: Path) -> None:
    weights = _weights(tmp_path, Quantization.INT8, attention_bias=True)
    plain = _weights(tmp_path, Quantization.NONE)
    assert weights.dtype is plain.dtype is torch.bfloat16
    assert weights.lm_head.data.dtype is torch.int8
    assert all(weight.data.dtype is torch.int8 for layer in weights.layers for weight in layer.sites.values())
    assert torch.equal(unpack(weights.embed), unpack(plain.embed))
    assert torch.equal(weights.norm, plain.norm)
    for target in Target:
        expected = quantize(plain.target_weight(1, target)).dequantize()
        assert torch.equal(weights.target_weight(1, target), expected)
        assert str(weights.target_bias(1, target)) == str(plain.target_bias(1, target))


def test_a_tied_table_is_quantized_once_for_both_uses(tmp_path: Path) -> None:
    weights = _weights(tmp_path, Quantization.INT8, tie_word_embeddings=True)
    assert weights.embed is weights.lm_head
    assert weights.embed.data.dtype is torch.int8


def test_int8_weights_take_half_the_memory_of_bfloat16(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "tie_word_embeddings": True}
    weights = _weights(tmp_path, Quantization.INT8, **sizes)
    plain = _weights(tmp_path, Quantization.NONE)
    assert 0.5 < weights.num_bytes / plain.num_bytes < 0.52


def test_fused_sites_keep_a_scale_per_row_of_each_target(tmp_path: Path) -> None:
    weights = _weights(tmp_path, Quantization.INT8)
    plain = _weights(tmp_path, Quantization.NONE)
    scales = weights.layers[0].sites[Site.QKV].scales
    assert scales is not None
    expected = [quantize(plain.target_weight(0, target)).scales for target in Site.QKV.value]
    assert torch.equal(scales[: sum(len(part) for part in expected)], torch.cat(expected))

"""For every field of adapter_config.json: the decoder's logits are peft's, alone and in a batch of everything."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from support.adapters import ALL_TARGETS, AdaptedDecoder, base_logits, make_adapter, peft_logits
from support.models import make_checkpoint
from support.tolerances import LOGITS_ATOL

PROMPT = [5, 3, 77, 4, 20, 9, 100, 5]


@dataclass(frozen=True)
class Case:
    """One adapter config on one kind of base model."""

    name: str
    base: str
    config: dict[str, Any] = field(default_factory=dict)


def _cases(base: str, **configs: dict[str, Any]) -> list[Case]:
    return [Case(f"{base}-{name}", base, config) for name, config in configs.items()]


CASES = [
    *_cases(
        "llama",
        plain={},
        odd_rank={"r": 7},
        default_targets={"target_modules": None},
        all_linear={"target_modules": "all-linear", "r": 5},
        rslora={"use_rslora": True, "r": 16, "target_modules": ALL_TARGETS},
        rank_and_alpha_patterns={
            "rank_pattern": {"q_proj": 9, "layers.1.self_attn.v_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
        rslora_with_patterns={"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {r".*\.1\..*": 3.5}},
        regex_targets={"target_modules": r".*\.(q|up)_proj"},
        excluded_names={"exclude_modules": ["layers.0.self_attn.q_proj"]},
        excluded_regex={"exclude_modules": r".*\.1\..*"},
        some_layers={"layers_to_transform": [1]},
        one_layer_under_a_pattern={"layers_to_transform": 1, "layers_pattern": "layers"},
        lora_bias_without_base_bias={"lora_bias": True},
        dora={"use_dora": True, "target_modules": ALL_TARGETS},
        saved_embedding_and_head={"modules_to_save": ["embed_tokens", "lm_head"]},
        saved_head={"modules_to_save": ["lm_head"]},
        saved_norms={"modules_to_save": ["input_layernorm", "norm"]},
        saved_head_alone={"target_modules": "dummy-target-modules", "modules_to_save": ["lm_head"]},
        embedding_lora={"target_modules": ["embed_tokens", "q_proj"]},
        head_lora={"target_modules": ["lm_head", "q_proj"]},
        head_lora_bias={"target_modules": ["lm_head"], "lora_bias": True},
        dora_on_embedding_and_head={"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
        fan_in_fan_out={"fan_in_fan_out": True},
        token_list={"trainable_token_indices": [5, 3, 77]},
        token_table={"trainable_token_indices": {"embed_tokens": [5, 3, 77], "lm_head": [4, 3]}},
        gaussian_init={"init_lora_weights": "gaussian"},
        eva_init={"init_lora_weights": "eva"},
        mica_init={"init_lora_weights": "mica"},
        random_init={"init_lora_weights": False},
    ),
    *_cases(
        "qwen2",
        bias_all={"bias": "all"},
        bias_lora_only={"bias": "lora_only"},
        lora_bias={"lora_bias": True, "target_modules": ALL_TARGETS},
        lora_bias_and_bias_all={"lora_bias": True, "bias": "all"},
        dora={"use_dora": True},
        dora_bias_all_rslora={"use_dora": True, "bias": "all", "use_rslora": True},
        saved_projection_with_bias={"modules_to_save": ["k_proj", "norm"]},
        saved_projection_and_bias_all={"modules_to_save": ["k_proj"], "bias": "all"},
    ),
    *_cases(
        "qwen3",
        saved_head_norms={"modules_to_save": ["norm", "gate_proj"]},
        orthogonal_init={"target_modules": ALL_TARGETS, "init_lora_weights": "orthogonal"},
    ),
    *_cases("mistral", all_linear={"target_modules": "all-linear"}),
    *_cases(
        "llama_tied",
        plain={},
        tokens={"trainable_token_indices": [5, 3, 77]},
        tokens_of_head={"trainable_token_indices": {"lm_head": [5, 3]}},
        same_tokens={"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 3]}},
        other_tokens={"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 4]}},
        tokens_under_head_lora={"trainable_token_indices": [5, 3], "target_modules": ["lm_head", "q_proj"]},
        tokens_kept_tied={"trainable_token_indices": [5, 3, 77], "ensure_weight_tying": True},
        saved_embedding={"modules_to_save": ["embed_tokens"]},
        saved_head={"modules_to_save": ["lm_head"]},
        saved_both={"modules_to_save": ["embed_tokens", "lm_head"]},
        saved_embedding_kept_tied={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        saved_head_kept_tied={"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        embedding_lora={"target_modules": ["embed_tokens", "q_proj"]},
        head_lora={"target_modules": ["lm_head", "q_proj"]},
        both_loras={"target_modules": ["embed_tokens", "lm_head"]},
        embedding_lora_kept_tied={"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        head_lora_kept_tied={"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
        regex_kept_tied={"target_modules": r"lm_head|.*\.q_proj", "ensure_weight_tying": True},
        dora_kept_tied={"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
        nothing_to_tie={"ensure_weight_tying": True},
    ),
]
BASES = tuple(dict.fromkeys(case.base for case in CASES))


class Bench:
    """Base checkpoints, their decoders and adapters, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._decoders: dict[str, AdaptedDecoder] = {}

    def base(self, name: str) -> Path:
        path = self._folder / name
        if not path.exists():
            architecture, _, tied = name.partition("_")
            make_checkpoint(path, architecture, tie_word_embeddings=bool(tied))
        return path

    def decoder(self, name: str) -> AdaptedDecoder:
        if name not in self._decoders:
            self._decoders[name] = AdaptedDecoder(self.base(name))
        return self._decoders[name]

    def adapter(self, case: Case) -> Path:
        path = self._folder / "adapters" / case.name
        if not path.exists():
            make_adapter(path, self.base(case.base), seed=CASES.index(case) if case in CASES else 99, **case.config)
        return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_with_an_adapter_equal_peft(case: Case, bench: Bench) -> None:
    adapter, decoder = bench.adapter(case), bench.decoder(case.base)
    expected = peft_logits(bench.base(case.base), adapter, PROMPT)
    assert (expected - base_logits(bench.base(case.base), PROMPT)).abs().max() > 0.5, "the adapter must matter"
    (actual,) = decoder.logits([(PROMPT, decoder.add(adapter))])
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("base", BASES)
def test_logits_in_one_batch_of_all_adapters_and_base_rows_in_chunks_equal_each_alone(base: str, bench: Bench) -> None:
    decoder = bench.decoder(base)
    cases: list[Case | None] = [None, *(case for case in CASES if case.base == base), None]
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(0, 131, (3 + 2 * index % 7,), generator=generator).tolist() for index, _ in enumerate(cases)
    ]
    adapter_ids = [None if case is None else decoder.add(bench.adapter(case)) for case in cases]
    sequences = decoder.sequences(len(cases), 16)
    actual: list[list[torch.Tensor]] = [[] for _ in cases]
    # three steps: chunks of different lengths, then single tokens, then what is left
    for start, end in ((0, 2), (2, 3), (3, 16)):
        chunks = {seq: prompt[start:end] for seq, prompt in enumerate(prompts) if prompt[start:end]}
        lora = decoder.state([(len(chunk), adapter_ids[seq]) for seq, chunk in chunks.items()])
        for seq, logits in sequences.step(chunks, lora).items():
            actual[seq].append(logits)
    for case, prompt, logits in zip(cases, prompts, actual, strict=True):
        path = bench.base(base)
        expected = base_logits(path, prompt) if case is None else peft_logits(path, bench.adapter(case), prompt)
        torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=LOGITS_ATOL, msg=str(case))


def test_base_rows_beside_adapters_are_bit_for_bit_those_of_a_batch_without_adapters(bench: Bench) -> None:
    decoder = bench.decoder("llama")
    dora = decoder.add(bench.adapter(next(case for case in CASES if case.name == "llama-dora")))
    beside = decoder.logits([(PROMPT, None), (PROMPT, dora), (PROMPT, None)])
    without = decoder.logits([(PROMPT, None), (PROMPT, None), (PROMPT, None)])
    assert torch.equal(beside[0], without[0])
    assert torch.equal(beside[2], without[2])
    assert not torch.equal(beside[1], without[1])


@pytest.mark.parametrize("base", ["llama", "llama_tied"])
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_tables_of_the_base_saved_along_replace_it_as_in_peft(
    base: str, name: str, bench: Bench, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", bench.base(base), target_modules=["q_proj", name])
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    (key,) = [key for key in tensors if key.endswith(f"{name}.base_layer.weight")]
    tensors[key] = tensors[key] + 0.3 * torch.randn(tensors[key].shape)
    safetensors.torch.save_file(tensors, file)
    expected = peft_logits(bench.base(base), adapter, PROMPT)
    decoder = bench.decoder(base)
    (actual,) = decoder.logits([(PROMPT, decoder.add(adapter))])
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGITS_ATOL)


def test_a_bin_file_gives_the_same_logits_as_safetensors(bench: Bench, tmp_path: Path) -> None:
    decoder = bench.decoder("llama")
    as_bin = make_adapter(tmp_path / "bin", bench.base("llama"), file_format="bin", use_dora=True)
    as_safetensors = make_adapter(tmp_path / "safetensors", bench.base("llama"), use_dora=True)
    assert (as_bin / "adapter_model.bin").exists()
    first, second = decoder.logits([(PROMPT, decoder.add(as_bin)), (PROMPT, decoder.add(as_safetensors))])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32_with_every_kind_of_part(dtype: torch.dtype, bench: Bench) -> None:
    half = AdaptedDecoder(bench.base("llama"), dtype)
    for name in ("rslora", "dora", "saved_embedding_and_head", "dora_on_embedding_and_head", "token_table"):
        adapter = bench.adapter(next(case for case in CASES if case.name == f"llama-{name}"))
        expected = peft_logits(bench.base("llama"), adapter, PROMPT)
        (actual,) = half.logits([(PROMPT, half.add(adapter))])
        error = (actual - expected).abs().mean() / expected.abs().mean()
        assert error < (0.08 if dtype is torch.bfloat16 else 0.01), name

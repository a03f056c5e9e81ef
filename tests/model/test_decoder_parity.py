"""The decoder computes what transformers computes, through a paged cache, chunks and mixed batches."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pomona.kernels.dispatch import backends_of, use_backend
from pomona.model.decoder import Decoder
from support.models import ARCHITECTURES, PagedSequences, load_decoder, load_transformers, make_checkpoint
from support.tolerances import LOGITS_ATOL

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Variant:
    name: str
    architecture: str
    overrides: dict[str, Any] = field(default_factory=dict)


VARIANTS = [
    Variant("llama", "llama"),
    Variant("llama-mha", "llama", {"num_key_value_heads": 4}),
    Variant("llama-one-kv-head-tied", "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    Variant("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Variant("llama-wide-heads", "llama", {"head_dim": 32}),
    Variant("llama-eps", "llama", {"rms_norm_eps": 1e-2}),
    Variant("llama-sharded", "llama", {"max_shard_size": "50KB"}),
    Variant("llama-bin-tied", "llama", {"file_format": "bin", "tie_word_embeddings": True}),
    Variant("llama-float16", "llama", {"storage_dtype": torch.float16}),
    Variant("llama-bfloat16", "llama", {"storage_dtype": torch.bfloat16}),
    Variant("llama-theta", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 250.0}}),
    Variant("llama-linear", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    Variant("llama-dynamic", "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    Variant("llama-llama3", "llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    Variant("llama-yarn", "llama", {"rope_parameters": YARN, "head_dim": 32}),
    Variant("llama-yarn-range", "llama", {"rope_parameters": {**YARN, "beta_fast": 2.0}, "head_dim": 32}),
    Variant("qwen2-yarn-mscale", "qwen2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    Variant("qwen3-yarn-exact-range", "qwen3", {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 2.0}}),
    Variant("mistral", "mistral"),
    Variant("mistral-window", "mistral", {"sliding_window": 7}),
    Variant("mistral-wide-heads-tied", "mistral", {"head_dim": 24, "tie_word_embeddings": True, "sliding_window": 16}),
    Variant("qwen2", "qwen2"),
    Variant("qwen2-tied-mha", "qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Variant("qwen2-window", "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    Variant(
        "qwen2-layer-types",
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Variant("qwen3", "qwen3"),
    Variant("qwen3-narrow-heads-tied", "qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    Variant("qwen3-biases", "qwen3", {"attention_bias": True}),
    Variant("qwen3-window", "qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
]


@dataclass(frozen=True)
class Pair:
    theirs: Any
    ours: Decoder


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant = request.param
    path = make_checkpoint(tmp_path_factory.mktemp(variant.name), variant.architecture, **variant.overrides)
    return Pair(load_transformers(path), load_decoder(path))


def _prompts(lengths: list[int], vocab_size: int = 131) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _their_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.mark.parametrize("backend", backends_of("attention"))
def test_logits_of_every_position_equal_transformers(pair: Pair, backend: str) -> None:
    (prompt,) = _prompts([90])
    expected = _their_logits(pair.theirs, prompt)
    assert 0.5 < expected.std() < 20
    with use_backend(backend):
        actual = PagedSequences(pair.ours, num_seqs=1, max_tokens=90).step({0: prompt})[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGITS_ATOL)


def _generate_in_one_batch(decoder: Decoder, prompts: list[list[int]], num_output_tokens: int) -> list[list[int]]:
    """Greedy outputs of sequences that join at different steps, prompts in chunks beside the others' decodes."""
    paged = PagedSequences(decoder, num_seqs=len(prompts), max_tokens=max(map(len, prompts)) + num_output_tokens)
    tokens = [list(prompt) for prompt in prompts]
    goals = [len(prompt) + num_output_tokens for prompt in prompts]
    chunk_sizes = [8, 1, 11, 5]
    step = 0
    while any(len(ids) < goal for ids, goal in zip(tokens, goals, strict=True)):
        batch = {}
        for seq in (2, 0, 3, 1):
            if step >= 2 * seq and len(tokens[seq]) < goals[seq]:
                start = paged.num_computed[seq]
                batch[seq] = tokens[seq][start : start + chunk_sizes[seq]]
        for seq, logits in paged.step(batch).items():
            if paged.num_computed[seq] == len(tokens[seq]):
                tokens[seq].append(int(logits[-1].argmax()))
        step += 1
    return tokens


def test_64_greedy_tokens_are_what_transformers_would_choose_in_a_batch_of_chunks_and_decodes(pair: Pair) -> None:
    """Every token is the argmax of transformers' logits after the tokens before it, hence its greedy output."""
    prompts = _prompts([23, 1, 40, 9])
    for prompt, tokens in zip(prompts, _generate_in_one_batch(pair.ours, prompts, 64), strict=True):
        choices = _their_logits(pair.theirs, tokens[:-1]).argmax(-1).tolist()
        assert tokens[len(prompt) :] == choices[len(prompt) - 1 :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_64_greedy_tokens_equal_the_output_of_transformers_generate(architecture: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, architecture)
    prompts = _prompts([17, 3, 9, 12])
    with torch.inference_mode():
        expected = load_transformers(tmp_path).generate(
            torch.tensor([prompts[0]]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
        )
    assert _generate_in_one_batch(load_decoder(tmp_path), prompts, 64)[0] == expected[0].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_half_precision_stays_close_to_float32(dtype: torch.dtype, architecture: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, architecture)
    (prompt,) = _prompts([40])
    exact = PagedSequences(load_decoder(tmp_path), num_seqs=1, max_tokens=40).step({0: prompt})[0]
    rounded = PagedSequences(load_decoder(tmp_path, dtype), num_seqs=1, max_tokens=40).step({0: prompt})[0]
    theirs = _their_logits(load_transformers(tmp_path, dtype), prompt).float()
    assert rounded.dtype == torch.float32
    our_error, their_error = (rounded - exact).abs().mean(), (theirs - exact).abs().mean()
    assert our_error < 1.3 * their_error

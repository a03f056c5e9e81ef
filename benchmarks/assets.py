"""Makes what benchmarks run on: a random-weight checkpoint of a shape, a tokenizer, and adapters, in the cache.

    python -m benchmarks.assets                      # both shapes of the comparison, about 1.5 GB
    python -m benchmarks.assets --shape tiny

Everything is derived from fixed seeds. What is there already is kept; each folder appears whole or not at all.
"""

import argparse
import itertools
import json
import os
import shutil
import string
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import tokenizers
import torch
from rich.progress import Progress, TaskID
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from benchmarks import workload
from benchmarks.shapes import SHAPES, ModelShape

MIXED_RANKS = [4] * 32 + [128]
"""Ranks of the adapters of mixed batches: one large among small ones."""
_END_OF_TEXT = "<|endoftext|>"


def adapter_folders(shape: ModelShape) -> list[tuple[Path, int, int]]:
    """(folder, rank, seed) of every adapter of a shape."""
    root = workload.cache_dir() / shape.name / "adapters"
    ranks = [workload.LORA_RANK] * workload.NUM_ADAPTERS + MIXED_RANKS
    seen: dict[int, int] = {}
    folders = []
    for seed, rank in enumerate(ranks):
        index = seen.setdefault(rank, 0)
        seen[rank] += 1
        folders.append((root / workload.adapter_name(index, rank), rank, 1000 + seed))
    return folders


def make(shape: ModelShape, report: Callable[[str, int, int], None] = lambda what, done, total: None) -> Path:
    """Make whatever is missing of a shape's assets.

    Args:
        shape: which model.
        report: told what is being made, how many parts are done, and how many there are.

    Returns:
        The shape's folder.
    """
    root = workload.cache_dir() / shape.name
    folders = adapter_folders(shape)
    total = len(folders) + 2
    report("model", 0, total)
    _whole(root / "model", partial(write_model, shape))
    for done, (folder, rank, seed) in enumerate(folders, 1):
        report(folder.name, done, total)
        _whole(folder, partial(write_adapter, shape, lora_rank=rank, seed=seed))
    report("workload", total - 1, total)
    workload.write(shape)
    report("done", total, total)
    return root


def _whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder; it gets its name only when it is complete."""
    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    os.replace(partial, folder)


def write_model(shape: ModelShape, folder: Path) -> None:
    """Write a bfloat16 checkpoint with normal weights of standard deviation 0.02, and its tokenizer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * 0.02).to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden_size, dtype=torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(shape.vocab_size, shape.hidden_size), "model.norm.weight": ones()}
    for layer, (target, (fan_in, fan_out)) in itertools.product(range(shape.num_layers), shape.targets.items()):
        prefix = f"model.layers.{layer}.{_parent(target)}.{target}"
        tensors[f"{prefix}.weight"] = normal(fan_out, fan_in)
        if shape.has_qkv_bias and target in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}.bias"] = normal(fan_out)
    for layer in range(shape.num_layers):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ones()
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = ones()
    if not shape.is_tied:
        tensors["lm_head.weight"] = normal(shape.vocab_size, shape.hidden_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.hf_config(), indent=1) + "\n")
    write_tokenizer(shape.vocab_size, folder)


def _parent(target: str) -> str:
    return "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def write_adapter(shape: ModelShape, folder: Path, lora_rank: int, seed: int) -> None:
    """Write a PEFT LoRA adapter on all seven projections, alpha twice the rank, both factors random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (target, (fan_in, fan_out)) in itertools.product(range(shape.num_layers), shape.targets.items()):
        prefix = f"base_model.model.model.layers.{layer}.{_parent(target)}.{target}"
        a = torch.randn(lora_rank, fan_in, generator=generator) / fan_in**0.5
        b = torch.randn(fan_out, lora_rank, generator=generator) * 0.02 * (workload.LORA_RANK / lora_rank) ** 0.5
        tensors[f"{prefix}.lora_A.weight"] = a.to(torch.bfloat16)
        tensors[f"{prefix}.lora_B.weight"] = b.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.name,
        "r": lora_rank,
        "lora_alpha": 2 * lora_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(shape.targets),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _words() -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Tokens of a byte-level tokenizer: the bytes, then ever longer strings of letters, each with its merge."""
    yield from ((char, None) for char in sorted(pre_tokenizers.ByteLevel.alphabet()))
    letters = string.ascii_lowercase
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    yield from ((pair, (pair[0], pair[1])) for pair in pairs)
    yield from ((pair + letter, (pair, letter)) for pair in pairs for letter in letters)
    yield from ((first + second, (first, second)) for first in pairs for second in pairs)


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """Write a byte-level BPE tokenizer of exactly ``vocab_size`` tokens, made rather than trained. Id 0 ends a text."""
    words = list(itertools.islice(_words(), vocab_size - 1))
    vocab = {_END_OF_TEXT: 0} | {word: index for index, (word, _) in enumerate(words, 1)}
    merges = [merge for _, merge in words if merge is not None]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END_OF_TEXT])
    assert tokenizer.get_vocab_size() == vocab_size
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_OF_TEXT, "bos_token": _END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def _show(progress: Progress, task: TaskID, name: str, what: str, done: int, total: int) -> None:
    progress.update(task, description=f"{name}: {what}", completed=done, total=total)


def make_with_progress(shapes: list[ModelShape]) -> None:
    """Make the assets of several shapes with a progress bar."""
    with Progress() as progress:
        for shape in shapes:
            task = progress.add_task(shape.name, total=None)

            make(shape, partial(_show, progress, task, shape.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=SHAPES, action="append", help="repeatable; default: the two of the comparison"
    )
    names = parser.parse_args().shape or ["smollm2-135m", "qwen2.5-0.5b"]
    make_with_progress([SHAPES[name] for name in names])


if __name__ == "__main__":
    main()

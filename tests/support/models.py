"""Tiny random Hugging Face checkpoints, and running them through transformers and through Pomona's decoder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pomona.kernels.attention import AttentionBatch
from pomona.kernels.linear import quantize
from pomona.model.decoder import Decoder
from pomona.model.hf_config import read_spec
from pomona.model.lora import LoraState
from pomona.model.weights import Quantization, load_weights

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

_ARCHITECTURE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that layers matter and logits differ by a few units; no norm or bias left at its default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[1] ** 0.5)


def make_checkpoint(path: Path, architecture: str = "llama", **overrides: Any) -> Path:
    """Write a random checkpoint with transformers' own ``save_pretrained``.

    Args:
        path: folder to create.
        architecture: llama, mistral, qwen2 or qwen3.
        overrides: fields of the config; or ``seed``; ``storage_dtype``, the torch dtype on disk; ``max_shard_size``,
            for example "50KB"; ``file_format``, "safetensors" or "bin".

    Returns:
        ``path``.
    """
    seed = overrides.pop("seed", 0)
    storage_dtype = overrides.pop("storage_dtype", torch.float32)
    max_shard_size = overrides.pop("max_shard_size", "1GB")
    file_format = overrides.pop("file_format", "safetensors")
    fields = {**_DEFAULTS, **_ARCHITECTURE_DEFAULTS[architecture], **overrides}
    config = transformers.AutoConfig.for_model(architecture, **fields)
    auto_model: Any = transformers.AutoModelForCausalLM
    model = auto_model.from_config(config)
    randomize(model, seed)
    model.to(storage_dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if file_format == "bin":
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return path


def edit_config(path: Path, **fields: Any) -> Path:
    """Change fields of a checkpoint's config.json; the value ``...`` removes one."""
    config = json.loads((path / "config.json").read_text())
    config.update(fields)
    kept = {name: value for name, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))
    return path


def load_transformers(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers sees it."""
    auto_model: Any = transformers.AutoModelForCausalLM
    model = auto_model.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.eval()


def load_decoder(
    path: Path, dtype: torch.dtype = torch.float32, quantization: Quantization = Quantization.NONE
) -> Decoder:
    """The checkpoint as Pomona sees it, on the CPU."""
    spec = read_spec(path)
    return Decoder(spec, load_weights(path, spec, dtype, torch.device("cpu"), quantization=quantization))


def dequantized_checkpoint(path: Path, source: Path) -> Path:
    """Write a float32 copy of a checkpoint with its matrices as int8 serves them; an embedding of its own stays."""
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    is_tied = read_spec(source).is_tied
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and (is_tied or "embed_tokens" not in name):
            tensors[name] = quantize(tensor).dequantize()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


class PagedSequences:
    """Sequences with scattered blocks in a poisoned KV cache: what a runner does, in a few lines, for decoder tests.

    Args:
        decoder: what runs.
        num_seqs: how many sequences there will be.
        max_tokens: of any sequence.
        block_size: tokens per block.
    """

    def __init__(self, decoder: Decoder, num_seqs: int, max_tokens: int, block_size: int = 4) -> None:
        self.decoder = decoder
        self.block_size = block_size
        spec = decoder.spec
        blocks_per_seq = -(-max_tokens // block_size)
        num_blocks = num_seqs * blocks_per_seq + 3
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        nan = float("nan")
        dtype = decoder.weights.dtype
        self.kv_cache = [
            (torch.full(shape, nan, dtype=dtype), torch.full(shape, nan, dtype=dtype)) for _ in range(spec.num_layers)
        ]
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(num_blocks - 1, generator=generator) + 1  # block 0 is what padding of tables points at
        self.tables = order[: num_seqs * blocks_per_seq].view(num_seqs, blocks_per_seq).int()
        self.num_computed = [0] * num_seqs

    def step(self, token_ids: dict[int, list[int]], lora: LoraState | None = None) -> dict[int, Tensor]:
        """Compute the next tokens of some sequences in one batch.

        Args:
            token_ids: sequence -> its next tokens, one or many, in batch order.
            lora: the rows' adapters; as logits are computed of every row, ``extras`` and ``logit_extras`` are alike.

        Returns:
            sequence -> float32 logits [num_tokens, vocab_size].
        """
        seqs = list(token_ids)
        lens = [len(ids) for ids in token_ids.values()]
        starts = [0]
        for length in lens:
            starts.append(starts[-1] + length)
        context_lens = [self.num_computed[seq] + length for seq, length in zip(seqs, lens, strict=True)]
        positions = torch.cat([torch.arange(end - length, end) for end, length in zip(context_lens, lens, strict=True)])
        row_seqs = torch.tensor(seqs).repeat_interleave(torch.tensor(lens))
        slots = self.tables[row_seqs, positions // self.block_size] * self.block_size + positions % self.block_size
        max_blocks = -(-max(context_lens) // self.block_size)
        used = torch.tensor(context_lens).unsqueeze(1) > torch.arange(max_blocks) * self.block_size
        batch = AttentionBatch(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
            block_tables=self.tables[seqs, :max_blocks].masked_fill(~used, 0),
            slot_mapping=slots.long(),
            host_query_lens=tuple(lens),
            host_context_lens=tuple(context_lens),
        )
        ids = torch.tensor([token_id for part in token_ids.values() for token_id in part])
        with torch.inference_mode():
            hidden = self.decoder.forward(ids, positions, self.kv_cache, batch, lora)
            logits = self.decoder.logits(hidden, lora)
        for seq, end in zip(seqs, context_lens, strict=True):
            self.num_computed[seq] = end
        return {seq: logits[starts[i] : starts[i + 1]] for i, seq in enumerate(seqs)}

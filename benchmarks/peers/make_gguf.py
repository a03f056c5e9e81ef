"""Writes the checkpoint and the adapters of a workload as GGUF files: the base in bfloat16, adapters in float32.

    ENV/bin/python -m benchmarks.peers.make_gguf ~/.cache/pomona-bench/smollm2-135m/workload.json

Runs in llama.cpp's environment (numpy and gguf, no torch). Files that are there already are kept.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

_ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2}
_PROJECTIONS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def read_bfloat16(path: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Yield (name, bit patterns) of every tensor of a safetensors file; all must be bfloat16."""
    content = np.memmap(path, dtype=np.uint8, mode="r")
    header_bytes = int(content[:8].view("<u8")[0])
    header = json.loads(content[8 : 8 + header_bytes].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", f"{path}: {name} is {entry['dtype']}"
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        yield name, np.frombuffer(content[begin:end].tobytes(), dtype="<u2").reshape(entry["shape"])


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bit patterns as float32 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rotary_order(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Reorder output rows from Hugging Face's rotary pairs (i, i + d/2) to neighbouring pairs (2i, 2i + 1).

    llama.cpp rotates neighbouring rows for the llama architecture; a projection to heads must be stored accordingly.
    """
    head_dim = weight.shape[0] // num_heads
    halves = weight.reshape(num_heads, 2, head_dim // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def gguf_name(name: str) -> str:
    """blk.3.attn_q.weight for model.layers.3.self_attn.q_proj.weight."""
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    parts = module.split(".")
    return f"blk.{parts[2]}.{(_PROJECTIONS | _NORMS)[parts[-1]]}.{kind}"


def _heads_to_reorder(name: str, config: dict[str, Any]) -> int:
    """Number of heads whose rows must be reordered; 0 if the tensor stays as it is."""
    if config["architectures"][0] != "LlamaForCausalLM":
        return 0
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".k_proj." in name else 0


def write_base(model: Path, path: Path) -> None:
    """Write the base model; norms and biases in float32, as llama.cpp expects."""
    config = json.loads((model / "config.json").read_text())
    architecture = _ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")  # prompts are token ids
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, bits in read_bfloat16(model / "model.safetensors"):
        if num_heads := _heads_to_reorder(name, config):
            bits = rotary_order(bits, num_heads)
        if bits.ndim == 1:
            writer.add_tensor(gguf_name(name), to_float32(bits))
        else:
            writer.add_tensor(gguf_name(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    _finish(writer, path)


def write_adapter(adapter: Path, model: Path, path: Path) -> None:
    """Write a PEFT adapter in float32."""
    config = json.loads((model / "config.json").read_text())
    peft = json.loads((adapter / "adapter_config.json").read_text())
    architecture = _ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(peft["lora_alpha"]))
    for name, bits in read_bfloat16(adapter / "adapter_model.safetensors"):
        module, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        weight = to_float32(bits)
        num_heads = _heads_to_reorder(name, config)
        if num_heads and kind == "lora_B":
            weight = rotary_order(weight, num_heads)
        writer.add_tensor(f"{gguf_name(module + '.weight')}.{kind.lower()}", weight)
    _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    content = json.loads(parser.parse_args().workload.read_text())
    model = Path(content["model"])
    jobs: list[tuple[Path, Callable[[Path], None]]] = [(Path(content["gguf"]), partial(write_base, model))]
    for entry in content["adapters"]:
        jobs.append((Path(entry["gguf"]), partial(write_adapter, Path(entry["path"]), model)))
    for done, (path, write) in enumerate(jobs, 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            write(unfinished)
            os.replace(unfinished, path)
        print(f"\r{done}/{len(jobs)} GGUF files", end="" if done < len(jobs) else "\n", flush=True)


if __name__ == "__main__":
    main()

"""Adapters made by peft with random, non-zero weights; and running them through peft and through Pomona's decoder."""

import copy
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from pomona.adapters.digest import adapter_digest
from pomona.adapters.peft_config import parse_config
from pomona.adapters.sources import read_files
from pomona.adapters.targets import resolve
from pomona.core.ids import AdapterId, PageId
from pomona.core.plan import AdapterLoad
from pomona.model.adapter_state import parse_tensors
from pomona.model.adapter_weights import AdapterLoader, AdapterWeights
from pomona.model.decoder import Decoder
from pomona.model.lora import LoraState, PageLayout
from pomona.model.weights import Quantization
from pomona.runner.adapter_pool import AdapterPool
from pomona.runner.batch import AdapterRun
from support.models import PagedSequences, load_decoder, load_transformers

ROWS_PER_PAGE = 4
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@functools.lru_cache(maxsize=8)
def _base_model(base_path: Path) -> Any:
    return load_transformers(base_path)


def make_adapter(
    path: Path, base_path: Path, *, seed: int = 0, file_format: str = "safetensors", **config: Any
) -> Path:
    """Create an adapter with peft, fill everything it trains with random values, and save it.

    Args:
        path: folder to create.
        base_path: checkpoint of the base model.
        seed: of the values.
        file_format: "safetensors" or "bin".
        config: fields of peft.LoraConfig; by default rank 4 on q_proj and v_proj.

    Returns:
        ``path``.
    """
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(_base_model(base_path)), peft.LoraConfig(**(fields | config)))
        _randomize_trained(model, seed)
        model.save_pretrained(str(path), safe_serialization=file_format == "safetensors")
    return path


def _randomize_trained(model: Any, seed: int) -> None:
    """Low-rank parts about a third of the weights they change; everything else moved clearly away from the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "lora_B" in name and name.endswith("weight"):
                parameter.copy_(0.2 * noise)
            elif "lora_embedding" in name:
                parameter.copy_(0.3 * noise)
            elif "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.3 * noise.clamp(-2, 2))
            else:
                parameter.add_(0.2 * noise)


def edit_adapter_config(path: Path, **fields: Any) -> Path:
    """Change fields of an adapter_config.json; the value ``...`` removes one."""
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    config.update(fields)
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return path


def peft_logits(base_path: Path, adapter_path: Path, token_ids: list[int]) -> Tensor:
    """float32 logits [num_tokens, vocab_size] of peft's own loading and forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(_base_model(base_path)), adapter_path).eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


def base_logits(base_path: Path, token_ids: list[int]) -> Tensor:
    """float32 logits [num_tokens, vocab_size] of transformers, without an adapter."""
    with torch.inference_mode():
        logits: Tensor = _base_model(base_path)(torch.tensor([token_ids])).logits[0].float()
    return logits


class AdaptedDecoder:
    """A decoder with adapters resident in a page pool: the tensor side of serving, without a scheduler."""

    def __init__(
        self,
        base_path: Path,
        dtype: torch.dtype = torch.float32,
        num_pages: int = 512,
        quantization: Quantization = Quantization.NONE,
    ) -> None:
        self.decoder: Decoder = load_decoder(base_path, dtype, quantization)
        layout = PageLayout(self.decoder.spec, ROWS_PER_PAGE)
        self.loader = AdapterLoader(self.decoder.weights, layout, num_pages)
        self._pool = AdapterPool(layout, torch.zeros((num_pages, layout.page_elems), dtype=dtype))
        # pages handed out from a shuffled list, so that no test passes because pages happen to be neighbours
        self._free_pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(2)).tolist()

    def convert(self, adapter_path: Path) -> tuple[AdapterId, AdapterWeights]:
        """Read, check and convert an adapter folder."""
        files = read_files(str(adapter_path))
        resolved = resolve(parse_config(files.config_bytes), self.loader.modules)
        return adapter_digest(files), self.loader.load(resolved, parse_tensors(files))

    def add(self, adapter_path: Path) -> AdapterId:
        """Convert an adapter and make it resident."""
        adapter_id, weights = self.convert(adapter_path)
        if adapter_id not in self._pool.resident_ids:
            page_ids = tuple(PageId(self._free_pages.pop()) for _ in range(self.loader.num_pages(weights)))
            self._pool.apply((), [AdapterLoad(adapter_id, page_ids)], {adapter_id: weights})
        return adapter_id

    def state(self, runs: list[tuple[int, AdapterId | None]]) -> LoraState | None:
        """LoRA inputs of a batch, given (number of rows, adapter) of each sequence; logits are wanted of every row."""
        adapter_runs, start = [], 0
        for num_rows, adapter_id in runs:
            end = start + num_rows
            if adapter_id is not None:
                adapter_runs.append(AdapterRun(adapter_id, start, end, start, end))
            start = end
        return self._pool.state(adapter_runs)

    def sequences(self, num_seqs: int, max_tokens: int) -> PagedSequences:
        """Fresh sequences with a KV cache of their own."""
        return PagedSequences(self.decoder, num_seqs, max_tokens)

    def logits(self, prompts: list[tuple[list[int], AdapterId | None]]) -> list[Tensor]:
        """float32 logits [num_tokens, vocab_size] of each prompt, all computed in one batch."""
        sequences = self.sequences(len(prompts), max(len(token_ids) for token_ids, _ in prompts))
        lora = self.state([(len(token_ids), adapter_id) for token_ids, adapter_id in prompts])
        result = sequences.step({seq: token_ids for seq, (token_ids, _) in enumerate(prompts)}, lora)
        return [result[seq] for seq in range(len(prompts))]

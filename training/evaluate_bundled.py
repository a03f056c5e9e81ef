"""Measures the saved bundled adapters with transformers and peft: exact match on held-out prompts, greedy decoding.

Example: python training/evaluate_bundled.py --dtype float32 bfloat16 --fresh 300
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tasks import TASKS
from words import held_out_words

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "src" / "pomona" / "bundled"
BASE_NAME = "pippin"
LEAST_WITH_ADAPTER = 0.90
MOST_WITH_BASE = 0.20
FRESH_SEED = 99
DTYPES = ["float32", "bfloat16"]
KINDS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclass(frozen=True)
class Row:
    """One adapter's line of the table."""

    name: str
    dtype: str
    shape: str
    with_adapter: float
    with_base: float
    kilobytes: float

    def passes(self) -> bool:
        """Whether both limits hold."""
        return self.with_adapter >= LEAST_WITH_ADAPTER and self.with_base <= MOST_WITH_BASE

    def markdown(self) -> str:
        """A markdown table row."""
        return (
            f"| {self.name} | {self.shape} | {self.dtype} | {self.with_adapter:.1%} | {self.with_base:.1%} "
            f"| {self.kilobytes:.0f} kB |"
        )


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Greedy answers to bare prompts through the chat template."""
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    results: list[str] = []
    for start in range(0, len(rendered), 128):
        batch = rendered[start : start + 128]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        results += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return results


def exact_match(given: list[str], expected: list[str]) -> float:
    """Share of exactly equal answers."""
    return sum(g == e for g, e in zip(given, expected, strict=True)) / len(expected)


def describe(config: dict[str, object]) -> str:
    """Rank, targets and kind of an adapter, in short, from its adapter_config.json."""
    targets = config["target_modules"]
    names = ["all-linear"] if isinstance(targets, str) else sorted(str(t).removesuffix("_proj") for t in targets)
    kinds = [kind for kind in KINDS if config.get(kind)]
    return f"r={config['r']} {','.join(names)}" + (f" ({', '.join(kinds)})" if kinds else "")


def fresh_pairs(name: str, count: int, seen: set[str]) -> list[dict[str, str]]:
    """Further held-out prompts that tasks.json does not contain."""
    if count <= 0:
        return []
    task = next(task for task in TASKS if task.name == name)
    words = [word for word in held_out_words(count + len(seen), FRESH_SEED) if word not in seen][:count]
    return [{"prompt": word, "answer": task.answer(word)} for word in words]


def evaluate(folder: Path, dtype: str, fresh: int) -> list[Row]:
    """All rows for one data type."""
    tokenizer = AutoTokenizer.from_pretrained(folder / BASE_NAME)
    rows = []
    for entry in json.loads((folder / "tasks.json").read_text()):
        pairs = entry["examples"] + fresh_pairs(entry["name"], fresh, {e["prompt"] for e in entry["examples"]})
        prompts, expected = [p["prompt"] for p in pairs], [p["answer"] for p in pairs]
        base = AutoModelForCausalLM.from_pretrained(folder / BASE_NAME, dtype=getattr(torch, dtype)).eval()
        with_base = exact_match(answers(base, tokenizer, prompts), expected)
        path = folder / "adapters" / entry["name"]
        model = PeftModel.from_pretrained(base, path, autocast_adapter_dtype=False).to(getattr(torch, dtype)).eval()
        with_adapter = exact_match(answers(model, tokenizer, prompts), expected)
        config = json.loads((path / "adapter_config.json").read_text())
        size = sum(f.stat().st_size for f in path.iterdir()) / 1e3
        rows.append(Row(entry["name"], dtype, describe(config), with_adapter, with_base, size))
        print(rows[-1].markdown(), flush=True)
    return rows


def main() -> int:
    """Prints the table; returns 1 when a limit is violated."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="example: python training/evaluate_bundled.py --dtype float32 bfloat16 --fresh 300",
    )
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="trained folder (default: package data)")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES, help="data types to run in")
    parser.add_argument("--fresh", type=int, default=0, help="held-out words per task beyond those in tasks.json")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    print("| adapter | shape | dtype | with adapter | base alone | size |\n|---|---|---|---|---|---|")
    rows = [row for dtype in arguments.dtype for row in evaluate(arguments.folder, dtype, arguments.fresh)]
    total = sum(f.stat().st_size for f in arguments.folder.rglob("*") if f.is_file()) / 1e6
    failed = [row for row in rows if not row.passes()]
    print(f"\ntotal size {total:.2f} MB; {len(rows) - len(failed)} of {len(rows)} rows within the limits")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

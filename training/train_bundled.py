"""Trains the bundled base model "pippin" and its adapters from nothing, and writes them with tasks.json.

Example: python training/train_bundled.py --out bundled-again --seed 7
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from adapters import ADAPTERS, AdapterSpec
from data import Example, Packer, base_exchange, task_exchange
from learning import Progress, Schedule, exact_match, fit
from pippin import BASE_NAME, build_base, build_tokenizer, task_prefix
from tasks import TASKS, Task, bare_answer
from words import draw_word, held_out_words

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "src" / "pomona" / "bundled"
EXAMPLES_PER_TASK = 100
EXAMPLE_SEED = 2024


def validation_words(count: int) -> list[str]:
    """A fixed list of validation words."""
    rng = random.Random(11)
    return [draw_word(rng, "validation", letter_strings=0.1) for _ in range(count)]


def write_json(path: Path, content: dict[str, object]) -> None:
    """Writes indented JSON with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the checkpoint folder in bfloat16; the chat template goes into tokenizer_config.json."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # The class name that every release of transformers knows.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)
    (folder / "model.safetensors").chmod(0o644)


def load_base(folder: Path, device: torch.device) -> LlamaForCausalLM:
    """The saved base in float32, with the attention that trains fastest at this size."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.name_or_path = BASE_NAME  # what the adapters will name as their base, instead of a path
    return model.to(device)


def base_report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> str:
    """Validation accuracy of every named task and of the bare prompt."""
    words = validation_words(100)
    parts = []
    for task in TASKS:
        examples = [Example(task_prefix(task.name) + word, task.answer(word)) for word in words]
        parts.append(f"{task.name} {exact_match(model, tokenizer, examples, device):.2f}")
    bare = exact_match(model, tokenizer, [Example(word, bare_answer(word)) for word in words], device)
    return ", ".join([*parts, f"no task {bare:.2f}"])


def train_base(folder: Path, steps: int, seed: int, device: torch.device) -> None:
    """Trains the base on named tasks and on prompts that name none."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_base(tokenizer).to(device)
    model.set_attn_implementation("eager")
    progress = Progress("base", steps, every=100)

    def on_step(step: int, loss: float) -> bool:
        progress.update(step, loss)
        if step % 1000 == 0 or step == steps:
            print(f"  validation: {base_report(model, tokenizer, device)}", flush=True)
        return False

    schedule = Schedule(steps, learning_rate=2e-3, warmup=min(200, steps // 5))
    fit(model, Packer(tokenizer, rng, base_exchange("train"), device, rows=16).batch, schedule, on_step)
    save_base(model, tokenizer, folder)


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Writes the two PEFT files in bfloat16, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    peft_model.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    for path in folder.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            path.unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set: the order would vary
    write_json(folder / "adapter_config.json", config)


def train_adapter(spec: AdapterSpec, task: Task, out: Path, steps: int, seed: int, device: torch.device) -> float:
    """Trains one adapter on bare words; returns its last validation accuracy."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed}-{spec.task}")
    tokenizer = AutoTokenizer.from_pretrained(out / BASE_NAME)
    base = load_base(out / BASE_NAME, device)
    peft_model = get_peft_model(base, spec.lora_config())
    validation = [Example(word, task.answer(word)) for word in validation_words(256)]
    progress = Progress(f"adapter {spec.task}", steps, every=100)
    accuracy = 0.0

    def on_step(step: int, loss: float) -> bool:
        nonlocal accuracy
        progress.update(step, loss)
        if step % 25 == 0 or step == steps:
            perfect_before = accuracy == 1.0
            accuracy = exact_match(base, tokenizer, validation, device)
            return accuracy == 1.0 and perfect_before
        return False

    schedule = Schedule(steps, spec.learning_rate, warmup=min(20, steps // 5))
    batches = Packer(tokenizer, rng, task_exchange(task, "train"), device, rows=8)
    done = fit(base, batches.batch, schedule, on_step)
    print(f"adapter {spec.task}: validation {accuracy:.3f} after {done} steps", flush=True)
    save_adapter(peft_model, out / "adapters" / spec.task)
    return accuracy


def write_tasks(path: Path) -> None:
    """Writes tasks.json: every task with held-out prompts and exact answers; one line per task."""
    words = held_out_words(EXAMPLES_PER_TASK, EXAMPLE_SEED)
    lines = []
    for task in TASKS:
        examples = [{"prompt": word, "answer": task.answer(word)} for word in words]
        entry = {"name": task.name, "description": task.description, "examples": examples}
        lines.append(json.dumps(entry, separators=(",", ":")))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Train the bundled base model and its adapters from nothing.",
        epilog="example: python training/train_bundled.py --out bundled-again --seed 7",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: the package's data)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and data (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 1 if others use the CPU (default: all)")
    parser.add_argument("--base-steps", type=int, default=3200, help="optimiser steps of the base (default: 3200)")
    parser.add_argument("--adapter-steps", type=int, default=300, help="most steps per adapter (default: 300)")
    parser.add_argument(
        "--adapters", nargs="*", metavar="NAME", help="keep the base in --out and train only these adapters"
    )
    return parser.parse_args()


def main() -> None:
    """Trains everything the arguments ask for."""
    arguments = parse_arguments()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    started = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_tasks(arguments.out / "tasks.json")
    if arguments.adapters is None:
        train_base(arguments.out / BASE_NAME, arguments.base_steps, arguments.seed, device)
    by_name = {task.name: task for task in TASKS}
    for spec in ADAPTERS:
        if arguments.adapters is None or spec.task in arguments.adapters:
            train_adapter(spec, by_name[spec.task], arguments.out, arguments.adapter_steps, arguments.seed, device)
    print(f"done in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

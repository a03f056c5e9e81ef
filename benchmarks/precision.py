"""What the precision of the base's weights costs in accuracy: the bundled model and its adapters, against float32.

    python -m benchmarks.precision             # two minutes on one core
    python -m benchmarks.precision --quick     # two adapters, to see that it works

Every adapter reads its held-out questions with their right answers, and so does the base alone; compared are the
distributions that predict the answers' tokens. Variants that Pomona does not serve are float32 checkpoints whose
matrices have been rounded so. Besides, adapters answer by themselves and are counted right only if every letter is.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks import results, tables
from benchmarks.results import Row, of_kind

if TYPE_CHECKING:
    from torch import Tensor

    from pomona import LLM
    from pomona.cli.accuracy import BundledTask

NUM_READ = 20
"""Questions per adapter whose answers are read."""
NUM_ASKED = 50
"""Questions per adapter that are answered."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to hold the weights."""

    name: str
    dtype: str
    """Of activations, adapters, and what is not quantized."""
    quantization: str = "none"
    bits: int = 0
    """Of a simulated variant: matrices are rounded to so many bits before they are loaded; 0: not simulated."""
    group: int | None = None
    """Inputs that share a scale; None: all of a row."""


REFERENCE = Variant("float32", "float32")
VARIANTS = (
    Variant("bfloat16", "bfloat16"),
    Variant("int8 per output, bfloat16", "bfloat16", "int8"),
    Variant("int8 per output, float32", "float32", "int8"),
    Variant("int8 per 64 inputs, float32 (simulated)", "float32", bits=8, group=64),
    Variant("int4 per 32 inputs, float32 (simulated)", "float32", bits=4, group=32),
    Variant("int4 per output, float32 (simulated)", "float32", bits=4),
)


def rounded(weight: "Tensor", bits: int, group: int | None) -> "Tensor":
    """A weight [out_features, in_features] as symmetric integers with a scale per group would hold it, float32."""
    levels = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    scales = groups.abs().amax(2, keepdim=True) / levels
    return ((groups / scales).round() * scales).flatten(1)


def _checkpoint(variant: Variant, folder: Path) -> Path:
    """The bundled model, rounded as a simulated variant says."""
    from safetensors.torch import load_file, save_file

    from pomona.cli.hub import bundled_dir

    target = folder / "model"
    shutil.copytree(bundled_dir() / "pippin", target)
    tensors = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        is_matrix = tensor.dim() == 2 and "embed_tokens" not in name
        tensors[name] = rounded(tensor, variant.bits, variant.group) if is_matrix else tensor.float()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def load(variant: Variant, folder: Path) -> "LLM":
    """The bundled model with its adapters in a variant."""
    from pomona import LLM
    from pomona.cli.hub import bundled_dir

    settings: dict[str, Any] = {"dtype": variant.dtype, "quantization": variant.quantization}
    settings |= {"kv_cache_bytes": "256MiB", "adapter_bytes": "128MiB", "prefix_cache": False}
    if variant.bits:
        settings["adapters_dir"] = (str(bundled_dir() / "adapters"),)
        return LLM(str(_checkpoint(variant, folder)), **settings)
    return LLM(**settings)


@contextlib.contextmanager
def _all_logprobs() -> Iterator[None]:
    """Requests may ask for the log-probabilities of a few tokens only; meanwhile they get those of all."""
    from pomona.runner import runner

    few = runner.token_logprobs
    runner.token_logprobs = lambda logits, token_ids, num_top: few(logits, token_ids, logits.shape[1])
    try:
        yield
    finally:
        runner.token_logprobs = few


def read_answers(llm: "LLM", tasks: Sequence["BundledTask"], adapter_of: Callable[[str], str | None]) -> "Tensor":
    """Log-probabilities [num_positions, vocab_size] that predict the tokens of the tasks' right answers."""
    import torch

    from pomona import SamplingParams

    asked = [(task.name, question, answer) for task in tasks for question, answer in task.answers.items()]
    questions = [llm.encode_chat(question) for _, question, _ in asked]
    answers = [llm.tokenizer.encode(answer, add_special_tokens=False) for _, _, answer in asked]
    with _all_logprobs():
        completions = llm.generate(
            [question + answer for question, answer in zip(questions, answers, strict=True)],
            adapter=[adapter_of(name) for name, _, _ in asked],
            sampling=SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1),
        )
    rows = []
    for completion, answer in zip(completions, answers, strict=True):
        for position in completion.prompt_logprobs[-len(answer) :]:
            row = torch.empty(llm.info.vocab_size)
            for token_id, logprob in position.top:
                row[token_id] = logprob
            rows.append(row)
    return torch.stack(rows)


def compare(reference: "Tensor", variant: "Tensor") -> Row:
    """How far two sets of distributions, log-probabilities [num_positions, vocab_size], are apart."""
    divergence = (reference.double().exp() * (reference.double() - variant.double())).sum(1)
    error = (reference - variant).abs()
    return {
        "num_positions": len(reference),
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "same_top": float((reference.argmax(1) == variant.argmax(1)).float().mean()),
        "logprob_error_mean": float(error.mean()),
        "logprob_error_max": float(error.max()),
    }


def measure_variant(variant: Variant, tasks: Sequence["BundledTask"]) -> tuple[dict[str, "Tensor"], float, float]:
    """Distributions with and without adapters, and the shares of right answers: mean and least of the adapters."""
    from pomona.cli.accuracy import measure

    with tempfile.TemporaryDirectory() as folder:
        llm = load(variant, Path(folder))
        some = _first(tasks, NUM_READ)
        read = {"adapters": read_answers(llm, some, str), "base": read_answers(llm, some, lambda name: None)}
        right = [found.with_adapter for found in measure(llm, _first(tasks, NUM_ASKED))]
    return read, statistics.fmean(right), min(right)


def _first(tasks: Sequence["BundledTask"], count: int) -> list["BundledTask"]:
    return [replace(task, answers=dict(list(task.answers.items())[:count])) for task in tasks]


def rows_of(tasks: Sequence["BundledTask"], variants: Sequence[Variant] = VARIANTS) -> Iterator[Row]:
    """Yield a row per variant and, in it, per kind of prompt."""
    reference, *right = measure_variant(REFERENCE, tasks)
    yield {"kind": "precision", "variant": REFERENCE.name, "right_mean": right[0], "right_least": right[1]}
    for variant in variants:
        read, right_mean, right_least = measure_variant(variant, tasks)
        parts = {which: compare(reference[which], read[which]) for which in reference}
        yield {
            "kind": "precision",
            "variant": variant.name,
            "right_mean": right_mean,
            "right_least": right_least,
            **parts,
        }


def precision_table(rows: Sequence[Row]) -> str:
    """Variants against float32."""
    lines = []
    for row in rows:
        line = [row["variant"], f"{row['right_mean']:.1%}", f"{row['right_least']:.0%}"]
        for which in ("adapters", "base"):
            part = row.get(which)
            if part is None:
                line += [tables.NONE] * 4
            else:
                line += [f"{part['kl_mean']:.1e}", f"{part['kl_max']:.1e}", f"{part['same_top']:.2%}"]
                line += [f"{part['logprob_error_mean']:.3f}"]
        lines.append(line)
    header = ["", "answers right", "worst adapter"]
    for which in ("adapters", "base"):
        header += [f"{which}: mean KL", "largest KL", "same top token", "mean log-prob. error"]
    return tables.table(header, lines)


def speed_table(rows: Sequence[Row]) -> str:
    """Steps of one shape, base alone, with bfloat16 and with int8 weights."""
    lines = []
    for phase, batch in dict.fromkeys((row["phase"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["phase"], row["batch"]) == (phase, batch)]
        plain, int8 = (tables.sample(here, "step_ms", quantization=name) for name in ("none", "int8"))
        if plain is None or int8 is None:
            continue
        floors = [tables.median_of(tables.counted(here, quantization=name), "floor_ms") for name in ("none", "int8")]
        lines.append(
            [
                f"{phase} of {batch}",
                plain.text("{:.2f}"),
                int8.text("{:.2f}"),
                f"{plain.median / int8.median:.2f}",
                f"{floors[0]:.2f}",
                f"{floors[1]:.2f}",
            ]
        )
    return tables.table(["", "bfloat16, ms", "int8, ms", "speed-up", "bfloat16 floor, ms", "int8 floor, ms"], lines)


def sections(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the parts of docs/benchmarks/precision.md: of accuracy and of each shape the program measured last."""
    found = results.of_last_program(list(of_kind(rows, "precision")))
    if found:
        yield "\n## Accuracy\n\nThe bundled model against itself in float32, with its adapters and alone; KL in nats.\n"
        yield f"Of its held-out questions each adapter answers the first {NUM_ASKED} itself, and reads the first "
        yield f"{NUM_READ} with their right answers.\n`pomona bench accuracy`, and the README's table, ask all of them."
        yield f"\n\n{tables.setup_text(found)}\n{precision_table(found)}"
    steps = list(of_kind(rows, "step"))
    for shape in dict.fromkeys(row["shape"] for row in steps):
        here = results.of_last_program([row for row in steps if row["shape"] == shape])
        yield f"\n## Speed: {shape}\n\nThe engine's steps, base alone, in turns.\n\n{tables.setup_text(here)}\n"
        yield f"{tables.noise_text(here)}\n{speed_table(here)}"


def main(words: Sequence[str] | None = None) -> None:
    from pomona.cli.accuracy import read_tasks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser, "precision", repeats=None)
    arguments = results.parse(parser, "precision", words)
    setup = results.setup()
    tasks = read_tasks()
    console = Console(soft_wrap=True)
    for row in rows_of(tasks[:2], VARIANTS[1:2]) if arguments.quick else rows_of(tasks):
        results.append(arguments.output, {**setup, **row})
        console.print(json.dumps(row), highlight=False)


if __name__ == "__main__":
    main()

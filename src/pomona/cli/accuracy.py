"""``pomona bench accuracy``: how often the bundled adapters answer exactly right, and the base alone on the same words.
Everything runs through Pomona's own engine, all adapters in one batch.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pomona.adapters.peft_config import parse_config
from pomona.cli.hub import bundled_dir
from pomona.cli.llm import LLM
from pomona.core.errors import ConfigError
from pomona.core.request import SamplingParams

_BEGIN, _END = "<!-- accuracy -->", "<!-- /accuracy -->"
_GREEDY = SamplingParams(max_tokens=48, temperature=0.0)


@dataclass(frozen=True, slots=True)
class BundledTask:
    """What a bundled adapter was trained to do, with held-out questions."""

    name: str
    description: str
    answers: Mapping[str, str]
    """prompt -> the only right answer."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of exact answers, between 0 and 1."""

    adapter: str
    num_prompts: int
    with_adapter: float
    base_alone: float
    description: str


def read_tasks() -> list[BundledTask]:
    """The tasks of the bundled adapters."""
    tasks = json.loads((bundled_dir() / "tasks.json").read_text())
    return [
        BundledTask(
            task["name"],
            task["description"],
            {example["prompt"]: example["answer"] for example in task["examples"]},
        )
        for task in tasks
    ]


def measure(llm: LLM, tasks: list[BundledTask]) -> list[Accuracy]:
    """Ask every question of every adapter and of the base, in one batch of mixed adapters."""
    asked = [(task, prompt, adapter) for task in tasks for prompt in task.answers for adapter in (task.name, None)]
    completions = llm.generate(
        [llm.encode_chat(prompt) for _, prompt, _ in asked],
        adapter=[adapter for _, _, adapter in asked],
        sampling=_GREEDY,
        show_progress=True,
    )
    num_right: dict[tuple[str, str | None], int] = {}
    for (task, prompt, adapter), completion in zip(asked, completions, strict=True):
        key = (task.name, adapter)
        num_right[key] = num_right.get(key, 0) + (completion.text == task.answers[prompt])
    return [
        Accuracy(
            task.name,
            len(task.answers),
            num_right[task.name, task.name] / len(task.answers),
            num_right[task.name, None] / len(task.answers),
            task.description,
        )
        for task in tasks
    ]


def run_accuracy(dtype: str, quantization: str = "none", update: Path | None = None) -> None:
    """Measure and print: a table to stderr, one JSON line per adapter to stdout.

    Args:
        dtype: of weights and activations.
        quantization: of the base's weights.
        update: a Markdown file whose table between the ``accuracy`` markers is replaced.

    Raises:
        ConfigError: there is no such file, or it has no such markers; nothing is measured.
    """
    around = None if update is None else _around_table(update)
    found = measure(LLM(dtype=dtype, quantization=quantization), read_tasks())
    if update is not None and around is not None:
        before, after = around
        update.write_text(f"{before}{_BEGIN}\n{_markdown(found)}\n{_END}{after}")
    table = Table("adapter", "does", "exact with it", "base alone", box=None, header_style="bold")
    for row in found:
        table.add_row(row.adapter, row.description, f"{row.with_adapter:.0%}", f"{row.base_alone:.0%}")
        setup = {"bench": "accuracy", "dtype": dtype, "quantization": quantization}
        sys.stdout.write(json.dumps({**setup, **asdict(row)}) + "\n")
    Console(stderr=True).print(table)


def _around_table(file: Path) -> tuple[str, str]:
    """What stands before and after the table that is to be replaced."""
    try:
        before, begin, rest = file.read_text().partition(_BEGIN)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--update {file}: cannot be read: {error}") from error
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ConfigError(f"--update {file}: must have {_BEGIN} and, after it, {_END}: the table goes between them")
    return before, after


def _markdown(found: list[Accuracy]) -> str:
    rows = ["| adapter | does | rank, projections | | exact | base alone |", "|---|---|---|---|---|---|"]
    for row in found:
        folder = bundled_dir() / "adapters" / row.adapter
        spec = parse_config((folder / "adapter_config.json").read_bytes())
        targets = spec.target_modules if isinstance(spec.target_modules, tuple) else ()
        where = "all" if len(targets) >= 7 else ", ".join(sorted(name.removesuffix("_proj") for name in targets))
        features = {
            "rsLoRA": spec.use_rslora,
            "DoRA": spec.use_dora,
            "rank and alpha patterns": spec.rank_pattern,
            f"saves {', '.join(spec.modules_to_save)}": spec.modules_to_save,
        }
        special = ", ".join(name for name, is_used in features.items() if is_used)
        rows.append(
            f"| `{row.adapter}` | {row.description} | {spec.lora_rank}, {where} | {special} "
            f"| {row.with_adapter:.0%} | {row.base_alone:.0%} |"
        )
    return "\n".join(rows)

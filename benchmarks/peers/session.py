"""How a system under comparison is driven: one process that loads once, then runs cells of the workload on command.

    ENV/bin/python -m benchmarks.peers.run_llama_cpp --workload W.json --adapters all --cell b32-128-64/uniform

With ``--serve`` cells are read from standard input instead, one JSON object per line. Each run prints one JSON line on
standard output; whatever the system itself prints goes to standard error. Standard library only: this is imported in
every system's own environment.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Adapter:
    """An adapter of the workload."""

    name: str
    path: str
    """PEFT folder."""
    gguf: str


@dataclass(frozen=True)
class Request:
    """One request of a cell."""

    prompt: list[int]
    adapter: int | None
    """Index into the workload's adapters."""


@dataclass(frozen=True)
class Work:
    """The workload of a shape, and which of its adapters this process is to load."""

    model: str
    gguf: str
    vocab_size: int
    lora_rank: int
    adapters: list[Adapter]
    num_loaded: int
    """Adapters to load: the first so many. 0 means the base model alone, without LoRA support."""
    max_batch: int
    max_tokens: int
    """Longest prompt plus output among the cells."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a run produced; times are seconds on ``time.perf_counter``."""

    token_ids: list[list[int]]
    first_token_s: list[float]
    finish_s: list[float]
    extra: dict[str, Any] = field(default_factory=dict)


class Runner(Protocol):
    """A loaded system."""

    def run(self, requests: list[Request], num_output_tokens: int) -> Outcome:
        """Serve all requests, which arrive together; every one yields exactly ``num_output_tokens``, greedily."""

    def versions(self) -> dict[str, str]:
        """Of the system and of what it stands on."""


def by_adapter(requests: list[Request]) -> list[tuple[int | None, list[int]]]:
    """(adapter, indices of its requests), largest group first: for systems whose batches have one adapter."""
    groups: dict[int | None, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.adapter, []).append(index)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def run_cell(
    runner: Runner, cell: dict[str, Any], num_output_tokens: int | None = None, num_prompt_tokens: int | None = None
) -> dict[str, Any]:
    """Run one cell and return its row: wall time, token times since the start, tokens.

    Args:
        runner: a loaded system.
        cell: of the workload.
        num_output_tokens: fewer, to warm up.
        num_prompt_tokens: only so many of each prompt, to warm up.
    """
    count = num_output_tokens or cell["num_output_tokens"]
    requests = [
        Request(prompt[:num_prompt_tokens], adapter)
        for prompt, adapter in zip(cell["prompts"], cell["assignment"], strict=True)
    ]
    start = time.perf_counter()
    outcome = runner.run(requests, count)
    wall_s = time.perf_counter() - start
    lengths = {len(token_ids) for token_ids in outcome.token_ids}
    assert len(outcome.token_ids) == len(requests)
    assert lengths == {count}, f"{count} tokens asked for, got {lengths}"
    return {
        "wall_s": wall_s,
        "first_token_s": [moment - start for moment in outcome.first_token_s],
        "finish_s": [moment - start for moment in outcome.finish_s],
        "token_ids": outcome.token_ids,
        **outcome.extra,
    }


def load_work(content: dict[str, Any], num_loaded: int, settings: dict[str, Any]) -> Work:
    """The workload as read from its file, for a process that loads so many adapters."""
    cells = content["cells"].values()
    return Work(
        model=content["model"],
        gguf=content["gguf"],
        vocab_size=content["vocab_size"],
        lora_rank=content["lora_rank"],
        adapters=[Adapter(**adapter) for adapter in content["adapters"]],
        num_loaded=num_loaded,
        max_batch=max(cell["batch"] for cell in cells),
        max_tokens=max(cell["num_prompt_tokens"] + cell["num_output_tokens"] for cell in cells),
        settings=settings,
    )


def main(load: Callable[[Work], Runner]) -> None:
    """Run a system: load it, then run the cells that the command line names or standard input asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--adapters", default="all", help="load the first so many adapters; 0: base only")
    parser.add_argument("--settings", default="{}", help="the system's own settings, as a JSON object")
    parser.add_argument("--cell", action="append", default=[])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--num-output-tokens", type=int, default=None, help="fewer, for trying it out")
    parser.add_argument("--serve", action="store_true", help='read {"cell": NAME} lines')
    arguments = parser.parse_args()
    content = json.loads(arguments.workload.read_text())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the rows

    def answer(row: dict[str, Any]) -> None:
        out.write(json.dumps(row) + "\n")
        out.flush()

    start = time.perf_counter()
    num_loaded = len(content["adapters"]) if arguments.adapters == "all" else int(arguments.adapters)
    runner = load(load_work(content, num_loaded, json.loads(arguments.settings)))
    answer({"kind": "ready", "load_s": time.perf_counter() - start, "versions": runner.versions()})
    for name in arguments.cell * arguments.repeats:
        answer({"cell": name, **run_cell(runner, content["cells"][name], arguments.num_output_tokens)})
    if arguments.serve:
        for line in sys.stdin:
            command = json.loads(line)
            cell = content["cells"][command["cell"]]
            limits = command.get("num_output_tokens"), command.get("num_prompt_tokens")
            answer({"cell": command["cell"], **run_cell(runner, cell, *limits)})

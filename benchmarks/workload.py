"""The comparison workload: the same prompts, adapters and output lengths for every system, as one JSON file per shape.

    python -m benchmarks.workload --shape smollm2-135m        # writes it into the cache, prints where

A cell is one run: a batch of requests that all arrive at once, prompts of one length, greedy, end-of-sequence ignored.
Popularities are Punica's (arXiv 2310.18547, section 7), exact rather than sampled. Same seed, same file.
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.shapes import SHAPES, ModelShape
from pomona.workload.popularity import GROUP_COUNTS, GroupKind

Popularity = Literal["base", "idle"] | GroupKind
POPULARITIES: tuple[Popularity, ...] = ("base", "idle", "identical", "uniform", "zipf-1.5", "distinct")
"""base: no adapter loaded. idle: adapters loaded, none asked for. The rest divide the batch among adapters."""

BASE_INT8 = "base int8"
"""What rows call the base alone with int8 weights, which no other system serves in this comparison."""

NUM_ADAPTERS = 32
LORA_RANK = 16
LORA_ALPHA = 32
SEED = 7
CACHE_VARIABLE = "POMONA_BENCH_CACHE"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the workload."""

    batch: int
    num_prompt_tokens: int
    num_output_tokens: int
    popularity: Popularity

    @property
    def name(self) -> str:
        """Such as b32-128-64/zipf-1.5."""
        return f"b{self.batch}-{self.num_prompt_tokens}-{self.num_output_tokens}/{self.popularity}"


def cells() -> list[Cell]:
    """All cells, those of one popularity together: systems that must restart to change adapters do so least."""
    lengths = {(32, 128, 64): POPULARITIES}
    lengths[32, 512, 32] = tuple(kind for kind in POPULARITIES if kind != "idle")
    lengths[8, 128, 64] = lengths[32, 512, 32]
    lengths[1, 128, 64] = ("base", "identical")
    return [
        Cell(*length, popularity=popularity)
        for popularity in POPULARITIES
        for length, popularities in lengths.items()
        if popularity in popularities
    ]


def cache_dir() -> Path:
    """Where models, adapters and environments of benchmarks live; never in the repository."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/pomona-bench").expanduser()


def adapter_name(index: int, lora_rank: int = LORA_RANK) -> str:
    """Name of an adapter, and of its folder."""
    return f"r{lora_rank}-{index:02d}"


def counts(popularity: Popularity, batch: int) -> tuple[int, ...]:
    """Requests per adapter, most popular first; none for base and idle."""
    if popularity == "base" or popularity == "idle":
        return ()
    return GROUP_COUNTS[popularity](batch)


def assign(popularity: Popularity, batch: int, seed: int = SEED) -> list[int | None]:
    """Adapter of each request, in an order that is shuffled once per seed."""
    of_requests = [index for index, count in enumerate(counts(popularity, batch)) for _ in range(count)]
    if not of_requests:
        return [None] * batch
    random.Random(f"{seed}/{popularity}/{batch}").shuffle(of_requests)
    return list(of_requests)


def prompts(shape: ModelShape, batch: int, num_tokens: int, seed: int = SEED) -> list[list[int]]:
    """Random token ids; the prompts of a small batch are the first of a large one, and all differ from the start."""
    rng = random.Random(f"{seed}/{shape.name}/{num_tokens}")
    return [[rng.randrange(256, shape.vocab_size) for _ in range(num_tokens)] for _ in range(batch)]


def build(shape: ModelShape, chosen: Sequence[Cell] | None = None, root: Path | None = None) -> dict[str, object]:
    """The workload as JSON-ready values.

    Args:
        shape: which model.
        chosen: which cells; None means all.
        root: folder of the shape's assets; None means its folder in the cache.
    """
    root = root or cache_dir() / shape.name
    return {
        "shape": shape.name,
        "seed": SEED,
        "model": str(root / "model"),
        "gguf": str(root / "gguf" / "base-bf16.gguf"),
        "vocab_size": shape.vocab_size,
        "lora_rank": LORA_RANK,
        "adapters": [
            {
                "name": adapter_name(index),
                "path": str(root / "adapters" / adapter_name(index)),
                "gguf": str(root / "gguf" / f"{adapter_name(index)}-f32.gguf"),
            }
            for index in range(NUM_ADAPTERS)
        ],
        "cells": {
            cell.name: {
                **asdict(cell),
                "prompts": prompts(shape, cell.batch, cell.num_prompt_tokens),
                "assignment": assign(cell.popularity, cell.batch),
            }
            for cell in (cells() if chosen is None else chosen)
        },
    }


def write(shape: ModelShape, chosen: Sequence[Cell] | None = None) -> Path:
    """Write the workload into the cache; return the file."""
    path = cache_dir() / shape.name / "workload.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(build(shape, chosen)) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=SHAPES, action="append", help="repeatable; default: the two of the comparison"
    )
    for name in parser.parse_args().shape or ("smollm2-135m", "qwen2.5-0.5b"):
        print(write(SHAPES[name]))


if __name__ == "__main__":
    main()

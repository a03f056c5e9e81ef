"""What the reproductions share: where data, charts and results are, and the cost of a step on published hardware."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from pomona.sim.cost_model import CostTerm, LinearCost

DATA = Path(__file__).resolve().parent / "data"
CHARTS = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks"

A100_LLAMA_7B = LinearCost(
    step_s=0.0107,
    terms=(
        CostTerm("num_rows", 6.5e-5),
        CostTerm("num_kv_tokens", 2.5e-7),
        CostTerm("num_adapter_rows", 3e-5),
        CostTerm("sum_adapter_ranks", 1.6e-6),
    ),
)
"""Llama-2-7B in fp16 on an A100 as Punica reports it (arXiv 2310.18547, section 7): a decode step of 11 to 13 ms at
batch 1 to 32 and short context, up to 34 ms at long; 1,044 tokens per second at batch 32. A prompt token costs 14 GFLOP
at some 215 TFLOP/s; an adapter's rank is 2.1 MB to read at 1.3 TB/s."""


class Report:
    """Rows of one reproduction, appended as they come, and its chart."""

    def __init__(self, name: str, path: Path, **settings: Any) -> None:
        self._name = name
        self._path = path
        self._setup = results.setup(**settings)

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Append and show a row."""
        results.append(self._path, {**self._setup, "kind": kind, **row})
        print(kind, dict(row))

    def draw(self, chart: str) -> None:
        """Write the chart beside the page."""
        CHARTS.mkdir(parents=True, exist_ok=True)
        (CHARTS / f"paper-{self._name}.svg").write_text(chart)


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the option that all share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = name if name == "plan" else f"paper-{name}"
    default = results.RESULTS / f"{results.today()}-{what}.jsonl"
    parser.add_argument("--output", type=Path, default=default, help="append rows here")
    return parser

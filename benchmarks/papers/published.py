"""Where the reproductions find their data and put their charts."""

from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
CHARTS = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks"

